"""A disk in virtual time behind io_uring: it works on one read after the other, at a given rate."""

import os
from collections.abc import Sequence

from flashmoe_mlx.stores.uring import RingRead


class Clock:
    """Virtual time in seconds; whoever waits sets it forward."""

    now = 0.0


class SlowDisk:
    """A class of rings, in place of ``uring.Ring``: all rings that it makes read from one disk.

    Args:
        clock: the time.
        rate: bytes per second.
        latency: seconds of each read beside its bytes.
    """

    def __init__(self, clock: Clock, rate: float, latency: float = 0.0) -> None:
        self.clock = clock
        self.rate = rate
        self.latency = latency
        self.idle_at = 0.0
        """The time at which the disk has made all reads."""

    def __call__(self, entries: int, workers: bool) -> "_Ring":
        return _Ring(self, entries)


class _Ring:
    """See ``uring.Ring``."""

    def __init__(self, disk: SlowDisk, entries: int) -> None:
        self._disk = disk
        self._entries = entries
        self._files: list[int] = []
        self._submitted = 0
        self._ends: dict[int, tuple[float, RingRead]] = {}

    def register_file(self, fd: int) -> int:
        self._files.append(fd)
        return len(self._files) - 1

    @property
    def running(self) -> int:
        return len(self._ends)

    @property
    def free(self) -> int:
        return self._entries - self.running

    def submit(self, reads: Sequence[RingRead]) -> list[int]:
        disk, first = self._disk, self._submitted
        self._submitted += len(reads)
        for number, read in enumerate(reads, first):
            start = max(disk.clock.now, disk.idle_at)
            disk.idle_at = start + disk.latency + len(read.view) / disk.rate
            self._ends[number] = disk.idle_at, read
        return list(range(first, self._submitted))

    def ended(self, at_least: int = 0) -> list[tuple[int, int]]:
        clock = self._disk.clock
        if at_least:
            awaited = sorted(end for end, _ in self._ends.values())[:at_least]
            clock.now = max(clock.now, *awaited)
        done = [number for number, (end, _) in self._ends.items() if end <= clock.now]
        return [(number, self._read(self._ends.pop(number)[1])) for number in done]

    def _read(self, read: RingRead) -> int:
        return os.preadv(self._files[read.file], [read.view], read.offset)

    def settle(self) -> None:
        self.ended(self.running)

    def close(self) -> None:
        self.settle()
