"""Parallel positioned reads into one buffer, trusting the page cache of the operating system."""

import os
import time
from collections.abc import Sequence
from threading import Lock
from typing import SupportsIndex

import mlx.core as mx
import psutil

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.expert_reader import ExpertReader
from flashmoe_mlx.expert_store import ExpertBatch, ExpertSource, ExpertStore, StoreClosedError, StoreStats


class PreadStore(ExpertStore):
    """Reads every expert that is asked for, each by one of ``threads`` threads, straight into its slot.

    Nothing is kept between fetches: what is read again soon comes from the page cache.
    """

    def __init__(self, source: ExpertSource, slots: int = 16, threads: int = 4) -> None:
        super().__init__(source, slots)
        size = source.layout.record_bytes
        memory = psutil.virtual_memory().total
        if slots * size > memory:  # MLX would crash on it
            raise InputError(f"slots={slots}: {slots * size / 1e9:.1f} GB, this machine has {memory / 1e9:.1f} GB")
        self._reader = ExpertReader(source, threads)
        self._slab = mx.zeros((slots, size), mx.uint8)
        self._host = memoryview(self._slab)  # type: ignore[arg-type]  # arrays have the buffer protocol
        self._rows = [memoryview(self._host.cast("B"))[slot * size : (slot + 1) * size] for slot in range(slots)]
        self._process = os.getpid()
        self._closed = False
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
            if self._closed:
                raise StoreClosedError("this store is closed")
            slots = {expert: slot for slot, expert in enumerate(dict.fromkeys(indices))}
            reads, nbytes = self._reader.read(layer, [(expert, self._rows[slot]) for expert, slot in slots.items()])
            self._stats += StoreStats(
                fetches=1,
                requests=len(slots),
                misses=len(slots),
                reads=reads,
                bytes_read=nbytes,
                fetch_seconds=time.perf_counter() - start,
            )
        return ExpertBatch(self._slab, self._host, tuple(slots[expert] for expert in indices))

    def stats(self) -> StoreStats:
        """Every request is a miss: this store keeps nothing."""
        return self._stats

    def close(self) -> None:
        """Wait for the fetch under way, then end the threads and close the files."""
        with self._fetching:
            self._closed = True
            self._reader.close()
