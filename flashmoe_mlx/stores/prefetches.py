"""Prefetches: reads of single records that nobody waits for yet, by a thread or through a ring."""

import logging
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event
from typing import Protocol

from flashmoe_mlx.formats.extents import read_exactly
from flashmoe_mlx.stores.contract import StoreStats
from flashmoe_mlx.stores.reads import FileDescriptorCache, Read, total_bytes
from flashmoe_mlx.stores.uring_reader import RingReads, UringReader

_log = logging.getLogger(__name__)


class Prefetch(Protocol):
    """The prefetch of one record into ``slot``; ``sampled`` are the counters of its lookup in the page cache.

    Classes that implement it inherit ``writing``.
    """

    slot: int
    sampled: StoreStats
    cancelled: bool
    used: bool

    @property
    def begun(self) -> bool:
        """Whether a read has begun."""
        ...

    @property
    def ended(self) -> bool:
        """Whether no read is running and none will begin."""
        ...

    @property
    def writing(self) -> bool:
        """Whether the slot may still be written to."""
        return not self.ended and (self.begun or not self.cancelled)

    @property
    def complete(self) -> bool:
        """Whether the whole record has been read."""
        ...

    @property
    def reads(self) -> int:
        """Number of reads."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes read."""
        ...

    def start(self) -> None:
        """Begin to read."""
        ...

    def wait(self) -> None:
        """Wait until it has ended."""
        ...


@dataclass(eq=False)
class RingPrefetch(Prefetch):
    """A prefetch through the ring of the reader; what has been submitted is not cancelled."""

    slot: int
    sampled: StoreStats
    ring: UringReader
    run: RingReads

    cancelled: bool = False
    used: bool = False

    @property
    def begun(self) -> bool:
        return self.run.count > 0

    @property
    def ended(self) -> bool:
        return self.run.ended

    @property
    def complete(self) -> bool:
        return self.run.ended and self.run.failure is None

    @property
    def reads(self) -> int:
        return self.run.count

    @property
    def nbytes(self) -> int:
        return self.run.nbytes

    def start(self) -> None:
        self.ring.begin(self.run)

    def wait(self) -> None:
        self.ring.wait(self.run)


@dataclass(eq=False, slots=True)
class ThreadPrefetch(Prefetch):
    """A prefetch by a thread, which sets the second group of fields; the owner sets all other fields."""

    slot: int
    sampled: StoreStats
    row: memoryview
    plan: list[Read]
    queue: "SimpleQueue[ThreadPrefetch | None]"

    begun: bool = False
    complete: bool = False
    reads: int = 0
    nbytes: int = 0
    finished: Event = field(default_factory=Event)

    cancelled: bool = False
    used: bool = False

    @property
    def ended(self) -> bool:
        return self.finished.is_set()

    def start(self) -> None:
        self.queue.put(self)

    def wait(self) -> None:
        self.finished.wait()

    def run(self, files: FileDescriptorCache) -> None:
        """Make the reads, unless cancelled; after an error ``complete`` stays false."""
        self.begun = True
        try:
            for read in self.plan:
                if self.cancelled:
                    return
                self.reads += read_exactly(files[read.path], read.view, read.offset)
                self.nbytes += len(read.view)
            self.complete = self.nbytes == total_bytes(self.plan)
        except Exception:  # the thread must survive for the next prefetch
            _log.debug("prefetch of expert %s failed", self.plan[0].expert, exc_info=True)
        finally:
            self.finished.set()
