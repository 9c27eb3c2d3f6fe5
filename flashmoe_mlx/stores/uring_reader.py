"""A reader that reads experts through io_uring, straight into memory of the caller."""

import errno
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.contract import BackendUnavailableError
from flashmoe_mlx.stores.libc import address_of
from flashmoe_mlx.stores.limits import DEPTH
from flashmoe_mlx.stores.reads import (
    FileDescriptorCache,
    Read,
    check_alignment,
    check_all_read,
    chunk_bytes,
    open_for_reading,
    plan_reads,
    total_bytes,
)
from flashmoe_mlx.stores.slab import Slab
from flashmoe_mlx.stores.staging import StagingArea
from flashmoe_mlx.stores.uring import Ring, RingRead


class UringReader:
    """A reader that reads experts through one ring.

    Args:
        source: the location of the experts.
        depth: maximum number of simultaneous reads.
        chunk_mib: maximum size of one read in MiB; None for no limit.
        direct: whether reads bypass the page cache.
        workers: whether threads of the kernel make the reads.
        registered: a slab whose slots the kernel pins once instead of in every read. It counts against the limit of
            locked memory (``ulimit -l``), and experts can be read only into these slots.

    Raises:
        InputError: an option is out of range (code "option_out_of_range"), or the source is not aligned for direct
            reads ("not_aligned").
        BackendUnavailableError: the system has no io_uring (code "no_io_uring") or cannot pin the slots ("cannot_pin").
    """

    def __init__(
        self,
        source: ExpertSource,
        depth: int,
        chunk_mib: float | None = None,
        direct: bool = False,
        workers: bool = False,
        registered: Slab | StagingArea | None = None,
    ) -> None:
        DEPTH.check("depth", depth)
        self._chunk = chunk_bytes(chunk_mib)
        if direct:
            check_alignment(source)
        self._source = source
        self._depth = depth
        self._ring = Ring(depth, workers)
        self._files = FileDescriptorCache(partial(open_for_reading, direct=direct))
        self._numbers: dict[Path, int] = {}
        self._buffers: dict[int, int] = {}
        """The index of each registered buffer by its address."""
        self._registered: Sequence[memoryview] = ()
        if registered is not None:
            try:
                self._register(registered)
            except BaseException:
                self.close()
                raise

    def _register(self, slab: Slab | StagingArea) -> None:
        rows = slab.rows(range(slab.count))
        try:
            self._ring.register_buffers(rows)
        except OSError as error:
            size = sum(map(len, rows))
            # The kernel cannot pin memory that CUDA manages (EFAULT), whatever the limit is.
            remedy = "" if error.errno == errno.EFAULT else "raise the limit of locked memory (ulimit -l), or "
            raise BackendUnavailableError(
                f"io_uring cannot pin {size / 1e6:.0f} MB of slots ({error.strerror}): {remedy}set "
                "backend.registered=false",
                code="cannot_pin",
            ) from error
        self._registered = rows  # as long as these exist, no other memory has their addresses
        self._buffers = {address_of(row): index for index, row in enumerate(rows)}

    def read(
        self,
        layer: int,
        wanted: Sequence[tuple[int, memoryview]],
        arrived: Callable[[Sequence[int]], None] | None = None,
        begun: Callable[[], None] | None = None,
    ) -> tuple[int, int]:
        """Read ``wanted``, pairs of an expert and its row in memory; return the numbers of reads and bytes.

        After this method returns or raises an error, nothing is written to the rows.

        Args:
            layer: a valid layer.
            wanted: the experts and their rows.
            arrived: called with experts whose rows are complete, after the reads that the ring makes at once.

        Raises:
            ExpertReadError: an expert could not be read; this is the first failure.
            ExpertStoreError: the ring did not answer for exactly the requested reads (code "lost_read").
            ValueError: the reader has registered slots, and a row is not one of them.
        """
        if begun is not None: begun()
        buffers = {expert: self._buffer(row) for expert, row in wanted}
        todo = list(plan_reads(self._source, layer, wanted, self._chunk))
        planned, nbytes = total_bytes(todo), 0
        count = 0
        while todo:
            batch, todo = todo[: self._depth], todo[self._depth :]
            ring_reads = [self._ring_read(layer, read, buffers[read.expert]) for read in batch]
            results = self._ring.run(ring_reads)
            count += len(batch)
            nbytes += sum(max(0, done) for done in results)
            remainders = (_rest(layer, read, done) for read, done in zip(batch, results, strict=True))
            todo = [rest for rest in remainders if rest] + todo
            complete = {read.expert for read in batch}.difference(read.expert for read in todo)
            if arrived is not None and complete:
                arrived(sorted(complete))
        check_all_read(layer, planned, nbytes)
        return count, nbytes

    def _buffer(self, row: memoryview) -> int | None:
        if not self._buffers:
            return None
        buffer = self._buffers.get(address_of(row))
        if buffer is None:
            raise ValueError("registered=true, but a row is not registered")
        return buffer

    def _ring_read(self, layer: int, read: Read, buffer: int | None) -> RingRead:
        number = self._numbers.get(read.path)
        if number is None:
            try:
                number = self._ring.register_file(self._files[read.path])
            except OSError as error:
                raise read.failed(layer, error) from error
            self._numbers[read.path] = number
        return RingRead(number, read.offset, read.view, buffer)

    def close(self) -> None:
        """Release the ring and close the files; no read may be running. Later calls have no effect."""
        self._ring.close()
        self._files.close()


def _rest(layer: int, read: Read, done: int) -> Read | None:
    """Return the read of the bytes that ``read`` left out, or None if it is complete.

    ``done`` is the number of bytes read, or a negated error number.
    """
    if done < 0:
        raise read.failed(layer, OSError(-done, os.strerror(-done)))
    if done == 0:
        raise read.failed(layer, EOFError(read.offset))
    if done >= len(read.view):
        return None
    return Read(read.expert, read.path, read.offset + done, read.view[done:])
