"""A reader that reads experts through io_uring, straight into memory of the caller."""

import errno
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.contract import BackendUnavailableError, ExpertReadError, ExpertStoreError
from flashmoe_mlx.stores.libc import address_of
from flashmoe_mlx.stores.limits import DEPTH
from flashmoe_mlx.stores.reads import (
    PARTS_AT_ONCE,
    FileDescriptorCache,
    Read,
    check_alignment,
    check_all_read,
    chunk_bytes,
    open_for_reading,
    part_bytes,
    plan_reads,
    total_bytes,
)
from flashmoe_mlx.stores.slab import Slab
from flashmoe_mlx.stores.staging import StagingArea
from flashmoe_mlx.stores.uring import Ring, RingRead


class UringReader:
    """A reader that reads experts through one ring, in the order of the calls; ``begin`` does so without a wait.

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
        self._depth = depth
        self.chunk: int | None = chunk_bytes(chunk_mib)
        """The maximum size of one read in bytes; None for no limit."""
        if direct:
            check_alignment(source)
        self._source = source
        self._direct = direct
        self._ring = Ring(2 * depth, workers)  # a request finds room beside all reads of ``begin``
        self._files = FileDescriptorCache(partial(open_for_reading, direct=direct))
        self._numbers: dict[Path, int] = {}
        self._running: dict[int, tuple[Read, RingReads]] = {}
        """Submitted reads by their numbers in the ring."""
        self._waiting: list[RingReads] = []
        """Reads for which the ring had no room, or which ended early."""
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
        done: Mapping[int, int] | None = None,
    ) -> tuple[int, int]:
        """Read ``wanted``, pairs of an expert and its row in memory; return the numbers of reads and bytes.

        These reads come before all reads of ``begin`` that wait for room. After this method returns or raises an error,
        it writes nothing to the rows. After any error but a failed read, nothing is written by reads of ``begin``
        either, and they have failed.

        Args:
            layer: a valid layer.
            wanted: the experts and their rows.
            arrived: called with experts whose rows are complete. Few and small reads then run at once, so that one
                expert arrives after the other.
            begun: called first, as soon as reads are under way.
            done: the bytes at the beginning of the records of some experts that need no read.

        Raises:
            ExpertReadError: an expert could not be read; this is the first failure.
            ExpertStoreError: the ring did not answer for exactly the requested reads (code "lost_read").
            ValueError: the reader has registered slots, and the row of an expert that is not in ``done`` is not one of
                them.
        """
        for expert, row in wanted:
            if self._buffers and address_of(row) not in self._buffers and expert not in (done or {}):
                raise ValueError("registered=true, but a row is not registered")
        in_parts = arrived is not None
        plan = plan_reads(self._source, layer, wanted, part_bytes(self.chunk) if in_parts else self.chunk, done)
        most = min(self._depth, PARTS_AT_ONCE) if in_parts else self._depth
        reads = RingReads(layer, plan, self._buffers_of(wanted), most)
        planned = total_bytes(reads.todo)
        try:
            self._submit(reads)
            if begun is not None:
                begun()
            while True:
                complete = reads.take_complete()  # some may have ended in ``begun``, which may wait for other reads
                if arrived is not None and complete and reads.failure is None:
                    arrived(complete)
                if reads.ended:
                    break
                self.poll(1)
        except BaseException:
            self._abandon()
            raise
        if reads.failure is not None:
            raise reads.failure
        check_all_read(layer, planned, reads.nbytes)
        return reads.count, reads.nbytes

    @property
    def has_room(self) -> bool:
        """Whether ``begin`` has room for another read."""
        return self._ring.running < self._depth

    def ahead(self, layer: int, expert: int, row: memoryview, plan: Iterable[Read]) -> "RingReads":
        """Return ``plan``, reads of ``expert`` into ``row``, for ``begin``."""
        buffers = self._buffers_of([(expert, row)])
        return RingReads(layer, plan, buffers, self._depth, ahead=True, by_worker=not self._direct)

    def begin(self, reads: "RingReads") -> None:
        """Begin ``reads`` without any wait; the reader owns their rows until they have ``ended``, after ``poll``."""
        try:
            self._submit(reads)
        except BaseException:
            self._abandon()
            raise

    def poll(self, at_least: int = 0) -> None:
        """Wait until ``at_least`` running reads have ended, and continue with all reads that wait for these."""
        try:
            for number, result in self._ring.ended(at_least):
                if number in self._running:
                    read, reads = self._running[number]
                    reads.take(read, result)
                    del self._running[number]
                    if reads.todo and reads not in self._waiting:
                        self._waiting.append(reads)
            if self._running and not self._ring.running:  # the kernel has not answered for some reads
                for read, reads in self._running.values():
                    reads.take(read, -errno.EIO)
                self._running.clear()
            waiting, self._waiting = self._waiting, []
            for reads in sorted(waiting, key=lambda reads: reads.ahead):
                self._submit(reads)
        except BaseException:
            self._abandon()
            raise

    def wait(self, reads: "RingReads") -> None:
        """Wait until ``reads``, a result of ``begin``, has ended."""
        while not reads.ended:
            self.begin(reads)  # an interrupt may have left reads out
            self.poll(1)

    def _submit(self, reads: "RingReads") -> None:
        """Submit as many of ``reads`` as there is room for, beside ``depth`` reads of ``begin``."""
        if reads.failure is not None or not reads.todo:
            return
        room = min(self._ring.free, reads.most - (self._ring.running if reads.ahead else reads.running))
        try:
            now = [reads.todo[place] for place in range(min(len(reads.todo), max(0, room)))]
            requests = [self._ring_read(read, reads) for read in now]
        except ExpertReadError as error:
            reads.fail(error)
            return
        for number, read in zip(self._ring.submit(requests), now, strict=True):
            self._running[number] = (read, reads)
            reads.note_submitted()
        if reads.todo and reads not in self._waiting:
            self._waiting.append(reads)

    def _abandon(self) -> None:
        """Wait for all running reads, which then have failed."""
        self._ring.settle()
        for _, reads in self._running.values():
            reads.running = 0
            reads.fail(ExpertStoreError("a read was abandoned"))
        self._running.clear()
        self._waiting.clear()

    def _buffers_of(self, wanted: Sequence[tuple[int, memoryview]]) -> dict[int, int | None]:
        return {expert: self._buffers.get(address_of(row)) for expert, row in wanted}

    def _ring_read(self, read: Read, reads: "RingReads") -> RingRead:
        number = self._numbers.get(read.path)
        if number is None:
            try:
                number = self._ring.register_file(self._files[read.path])
            except OSError as error:
                raise read.failed(reads.layer, error) from error
            self._numbers[read.path] = number
        return RingRead(number, read.offset, read.view, reads.buffers[read.expert], reads.by_worker)

    def close(self) -> None:
        """Wait for running reads, release the ring, and close the files. Later calls have no effect."""
        self._ring.close()
        self._running.clear()
        self._files.close()


class RingReads:
    """Reads that belong together.

    Args:
        layer: the layer of the experts.
        plan: the reads.
        buffers: the index of the registered buffer of each expert's row, or None.
        most: the maximum number of simultaneous reads.
        ahead: whether nobody waits for them yet.
        by_worker: whether threads of the kernel make the reads.

    Attributes:
        todo: reads that have not been submitted, first the rests of reads that ended early.
        running: number of submitted reads that have not ended.
        count: number of submitted reads.
        nbytes: bytes read.
        withdrawn_bytes: bytes at the end that are not read because of ``withdraw``.
        failure: the first failure.
    """

    def __init__(
        self,
        layer: int,
        plan: Iterable[Read],
        buffers: Mapping[int, int | None],
        most: int,
        ahead: bool = False,
        by_worker: bool = False,
    ) -> None:
        self.layer = layer
        self.buffers = buffers
        self.most = most
        self.ahead = ahead
        self.by_worker = by_worker
        self.todo: deque[Read] = deque(plan)
        self._rests = 0
        self.running: int = 0
        self.count: int = 0
        self.nbytes: int = 0
        self.withdrawn_bytes: int = 0
        self.failure: Exception | None = None
        self._left = Counter(read.expert for read in self.todo)
        self._complete: list[int] = []

    @property
    def ended(self) -> bool:
        """Whether no read is running and none will be submitted."""
        return not self.running and not (self.todo and self.failure is None)

    def note_submitted(self) -> None:
        """Move the first read of ``todo`` to the running reads."""
        self.todo.popleft()
        self._rests = max(0, self._rests - 1)
        self.running += 1
        self.count += 1

    def withdraw(self) -> None:
        """Forget the reads that have not been submitted. Submitted reads still end."""
        while len(self.todo) > self._rests:
            self.withdrawn_bytes += len(self.todo[-1].view)
            self.todo.pop()

    def take(self, read: Read, result: int) -> None:
        """Take the result of a read, the number of bytes or a negated error number."""
        self.running -= 1
        if result < 0:
            self.fail(read.failed(self.layer, OSError(-result, os.strerror(-result))))
        elif result == 0:
            self.fail(read.failed(self.layer, EOFError(read.offset)))
        else:
            self.nbytes += result
            if result < len(read.view):
                self.todo.appendleft(Read(read.expert, read.path, read.offset + result, read.view[result:]))
                self._rests += 1
                return
        self._left[read.expert] -= 1
        if not self._left[read.expert]:
            self._complete.append(read.expert)

    def take_complete(self) -> list[int]:
        """Return the experts that have become complete since the previous call."""
        complete, self._complete = self._complete, []
        return complete

    def fail(self, error: Exception) -> None:
        """Make ``error`` the failure, unless there is an earlier one."""
        self.failure = self.failure or error
