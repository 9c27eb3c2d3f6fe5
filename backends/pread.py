"""Parallel positioned reads into one buffer, trusting the page cache of the operating system."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Barrier, Lock
from typing import SupportsIndex

import mlx.core as mx
import psutil

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.expert_store import (
    BackendUnavailableError,
    ExpertBatch,
    ExpertReadError,
    ExpertSource,
    ExpertStore,
    StoreClosedError,
    StoreStats,
)
from flashmoe_mlx.pack.files import read_exactly


class PreadStore(ExpertStore):
    """Reads every expert that is asked for, each by one of ``threads`` threads, straight into its slot.

    Nothing is kept between fetches: what is read again soon comes from the page cache.
    """

    def __init__(self, source: ExpertSource, slots: int = 16, threads: int = 4) -> None:
        super().__init__(source, slots)
        if threads < 1:
            raise InputError(f"threads={threads}: at least 1 thread must read")
        size = source.layout.record_bytes
        memory = psutil.virtual_memory().total
        if slots * size > memory:  # MLX would crash on it
            raise InputError(f"slots={slots}: {slots * size / 1e9:.1f} GB, this machine has {memory / 1e9:.1f} GB")
        self._slab = mx.zeros((slots, size), mx.uint8)
        self._host = memoryview(self._slab)  # type: ignore[arg-type]  # arrays have the buffer protocol
        self._rows = [memoryview(self._host.cast("B"))[slot * size : (slot + 1) * size] for slot in range(slots)]
        self._files: dict[Path, int] = {}
        self._pool: ThreadPoolExecutor | None = _started_pool(threads)
        self._process = os.getpid()
        self._fetching = Lock()
        self._stats = StoreStats()

    def fetch(self, layer: int, experts: Sequence[SupportsIndex]) -> ExpertBatch:
        """Read ``experts`` of ``layer`` into the first slots."""
        start = time.perf_counter()
        layer, indices = self.checked_request(layer, experts)
        if os.getpid() != self._process:
            raise StoreClosedError(
                "this store was opened by another process, whose threads it reads with; open one here"
            )
        with self._fetching:
            pool = self._pool
            if pool is None:
                raise StoreClosedError("this store is closed")
            slots = {expert: slot for slot, expert in enumerate(dict.fromkeys(indices))}
            pending: list[Future[tuple[int, int]]] = []
            try:
                for expert, slot in slots.items():
                    pending.append(pool.submit(self._read, layer, expert, slot))
                wait(pending)
            except BaseException:
                # An interrupt must not leave reads behind that write into slots after the fetch.
                for read in pending:
                    read.cancel()
                wait(pending)
                raise
            self._count(pending, time.perf_counter() - start)
        return ExpertBatch(self._slab, self._host, tuple(slots[expert] for expert in indices))

    def _count(self, pending: Sequence[Future[tuple[int, int]]], seconds: float) -> None:
        done = [future.result() for future in pending]
        self._stats += StoreStats(
            fetches=1,
            requests=len(done),
            misses=len(done),
            reads=sum(reads for reads, _ in done),
            bytes_read=sum(nbytes for _, nbytes in done),
            fetch_seconds=seconds,
        )

    def _read(self, layer: int, expert: int, slot: int) -> tuple[int, int]:
        """Fill a slot; the number of reads and of bytes."""
        reads = done = 0
        for extent in self.source.extents(layer, expert):
            view = self._rows[slot][done : done + extent.nbytes]
            try:
                reads += read_exactly(self._file(extent.path), view, extent.offset)
            except EOFError as error:
                end = error.args[0]
                raise ExpertReadError(extent.path, layer, expert, end, "the file ends here, in mid-record") from None
            except OSError as error:
                reason = error.strerror or str(error)
                raise ExpertReadError(extent.path, layer, expert, extent.offset, reason) from error
            done += extent.nbytes
        return reads, done

    def _file(self, path: Path) -> int:
        fd = self._files.get(path)
        if fd is None:
            fd = os.open(path, os.O_RDONLY)
            # Another thread may have opened it meanwhile; one descriptor stays.
            if self._files.setdefault(path, fd) != fd:
                os.close(fd)
                fd = self._files[path]
        return fd

    def stats(self) -> StoreStats:
        """Every request is a miss: this store keeps nothing."""
        return self._stats

    def close(self) -> None:
        """Wait for the fetch under way, then end the threads and close the files."""
        with self._fetching:
            if self._pool is None:
                return
            self._pool.shutdown()
            self._pool = None
            for fd in self._files.values():
                os.close(fd)
            self._files.clear()


def _started_pool(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads all run: one that fails to start later would leave a read that nobody waits for."""
    pool = ThreadPoolExecutor(threads, "pread")
    together = Barrier(threads + 1)
    try:
        for _ in range(threads):
            pool.submit(together.wait)
    except RuntimeError as error:
        together.abort()
        pool.shutdown()
        raise BackendUnavailableError(f"cannot start {threads} threads: {error}; choose fewer threads") from error
    together.wait()
    return pool
