"""Prefetches: reads of the beginning of single records that nobody waits for yet, by threads or through a ring."""

import logging
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread

from flashmoe_mlx.formats.extents import read_exactly
from flashmoe_mlx.stores.contract import BackendUnavailableError, StoreStats
from flashmoe_mlx.stores.reads import FileDescriptorCache, Read, open_for_reading, total_bytes
from flashmoe_mlx.stores.uring_reader import RingReads, UringReader

_log = logging.getLogger(__name__)


class Prefetch(ABC):
    """The prefetch of a record, or of its beginning, into ``row``, the memory of ``slot``.

    ``size`` is the length of the whole record in bytes; ``sampled`` are the counters of its lookup in the page cache;
    the owner sets ``used``.
    """

    def __init__(self, slot: int, row: memoryview, size: int, sampled: StoreStats) -> None:
        self.slot: int = slot
        self.row: memoryview = row
        self.size: int = size
        self.sampled: StoreStats = sampled
        self.used: bool = False

    @property
    @abstractmethod
    def begun_bytes(self) -> int:
        """The length of the beginning of the record whose reads have begun; final after ``stop``."""

    @property
    @abstractmethod
    def begun(self) -> int:
        """Number of reads that have begun."""

    @property
    @abstractmethod
    def running(self) -> int:
        """Number of reads that have begun and not ended."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether no read is running and none will begin; the row is then not written to."""

    @property
    @abstractmethod
    def sound(self) -> bool:
        """Whether no read has failed."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes read."""

    @abstractmethod
    def start(self) -> None:
        """Begin to read."""

    @abstractmethod
    def stop(self) -> None:
        """Begin no further read."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until it has ended."""


class RingPrefetch(Prefetch):
    """A prefetch through the ring of the reader; what has been submitted is not cancelled."""

    def __init__(
        self, slot: int, row: memoryview, size: int, sampled: StoreStats, ring: UringReader, run: RingReads
    ) -> None:
        super().__init__(slot, row, size, sampled)
        self._ring = ring
        self._run = run
        self._planned = total_bytes(run.todo)

    @property
    def begun_bytes(self) -> int:
        return self._planned - self._run.withdrawn_bytes

    @property
    def begun(self) -> int:
        return self._run.count

    @property
    def running(self) -> int:
        return self._run.running

    @property
    def ended(self) -> bool:
        return self._run.ended

    @property
    def sound(self) -> bool:
        return self._run.failure is None

    @property
    def nbytes(self) -> int:
        return self._run.nbytes

    def start(self) -> None:
        self._ring.begin(self._run)

    def stop(self) -> None:
        self._run.withdraw()

    def wait(self) -> None:
        self._ring.wait(self._run)


class ThreadPrefetch(Prefetch):
    """A prefetch by threads, which share its reads.

    Each read is taken from one list, by a thread or by ``stop``. These single operations need no lock, so an interrupt
    at any point leaves no lock behind.
    """

    def __init__(
        self,
        slot: int,
        row: memoryview,
        size: int,
        sampled: StoreStats,
        plan: Sequence[Read],
        queue: "SimpleQueue[ThreadPrefetch | None]",
    ) -> None:
        super().__init__(slot, row, size, sampled)
        self._left: SimpleQueue[None] = SimpleQueue()
        """An item for each thread that has left; no interrupt of a wait leaves this queue unusable."""
        self._todo = deque(plan)
        self._queue = queue
        self._planned = len(plan)
        self._planned_bytes = total_bytes(plan)
        self._withdrawn: list[Read] = []
        self._made: list[int] = []
        """The number of bytes of each read that has ended."""
        self._failed = False

    @property
    def begun_bytes(self) -> int:
        return self._planned_bytes - total_bytes(self._withdrawn)

    @property
    def begun(self) -> int:
        return self._planned - len(self._withdrawn) - len(self._todo)

    @property
    def running(self) -> int:
        return self.begun - len(self._made)

    @property
    def ended(self) -> bool:
        return not self._todo and len(self._made) + len(self._withdrawn) == self._planned

    @property
    def sound(self) -> bool:
        return not self._failed and self.nbytes == self.begun_bytes

    @property
    def nbytes(self) -> int:
        return sum(self._made)

    def start(self) -> None:
        for _ in range(len(self._todo)):  # each idle thread takes part
            self._queue.put(self)

    def stop(self) -> None:
        # One call of compiled code, which no interrupt divides: no read is lost between the two lists.
        with suppress(IndexError):
            self._withdrawn.extend(iter(self._todo.pop, None))

    def wait(self) -> None:
        while not self.ended:
            self._left.get()

    def run(self, files: FileDescriptorCache) -> None:
        """Make reads until none is left; after an error ``sound`` is false."""
        while True:
            try:
                read = self._todo.popleft()
            except IndexError:
                break
            done = 0
            try:
                if not self._failed:
                    read_exactly(files[read.path], read.view, read.offset)
                    done = len(read.view)
            except Exception:  # the thread must survive for the next prefetch
                self._failed = True
                _log.debug("prefetch of expert %s failed", read.expert, exc_info=True)
            finally:
                self._made.append(done)
        self._left.put(None)


class PrefetchThreads:
    """Threads that make the reads of ``ThreadPrefetch``; they end with the last reference to this object.

    Args:
        count: the number of threads.
        direct: whether reads bypass the page cache.
    """

    def __init__(self, count: int, direct: bool) -> None:
        self._count = count
        self._files = FileDescriptorCache(partial(open_for_reading, direct=direct))
        self._threads: list[Thread] = []
        self.queue: SimpleQueue[ThreadPrefetch | None] = SimpleQueue()
        """Takes prefetches to work on."""
        self._end = weakref.finalize(self, _end, self.queue, self._threads)

    def start(self) -> None:
        """Start the threads, unless they run.

        Raises:
            BackendUnavailableError: the system starts no thread (code "no_threads").
        """
        try:
            while len(self._threads) < self._count:
                name = f"expert-prefetch-{len(self._threads)}"
                thread = Thread(target=_serve, args=(self.queue, self._files), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            if not self._threads:
                raise BackendUnavailableError(
                    f"cannot start a thread for prefetches: {error}; set prefetch=none", code="no_threads"
                ) from error

    def close(self) -> None:
        """End the threads and close the files. Later calls have no effect."""
        self._end()
        for thread in self._threads:
            thread.join()
        self._files.close()


def _serve(queue: "SimpleQueue[ThreadPrefetch | None]", files: FileDescriptorCache) -> None:
    while (job := queue.get()) is not None:
        job.run(files)
        del job  # its slot keeps the owner alive, whose finalizer ends this thread


def _end(queue: "SimpleQueue[ThreadPrefetch | None]", threads: Sequence[Thread]) -> None:
    for _ in threads:
        queue.put(None)
