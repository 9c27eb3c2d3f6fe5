"""Read experts ahead, before a request asks for them."""

import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Event, Thread

from flashmoe_mlx.formats.extents import ExpertSource, read_exactly
from flashmoe_mlx.stores.contract import BackendUnavailableError, StoreStats
from flashmoe_mlx.stores.filling import Filling
from flashmoe_mlx.stores.host_slots import CopyBuffer, HostSlots
from flashmoe_mlx.stores.readers import ExpertReader
from flashmoe_mlx.stores.reads import FileDescriptorCache, Read, open_for_reading, plan_reads, total_bytes
from flashmoe_mlx.stores.slab import Slab

_log = logging.getLogger(__name__)

MOST_THREADS = 8
_CHUNK = 2**22
"""Bytes of one read; small, so that a stale read soon frees the storage for real requests."""


class ReadAhead:
    """A reader that also takes hints: it prefetches the named experts into separate slots.

    The latest hint counts: a hint and a request each cancel the reads of earlier hints that no request wanted. A read
    ahead that fails is repeated, and its error reported, when the expert is requested. The first hint allocates
    ``slots`` records and starts the threads.

    Args:
        source: where the experts are.
        reader: reads the experts that were not read ahead; closed by ``close``.
        slots: most experts of a request, and of all reads ahead together.
        threads: threads that read ahead, of which there are at most ``MOST_THREADS``.
        direct: read ahead past the page cache.
        slab: serves batches in place (``fetch``), from at least ``slots`` slots; the first hint replaces it by one of
            twice ``slots`` unless it has that many. Without it ``read`` brings experts to slots of the caller.
    """

    def __init__(
        self,
        source: ExpertSource,
        reader: ExpertReader,
        slots: int,
        threads: int,
        direct: bool = False,
        slab: Slab | None = None,
    ) -> None:
        self._source = source
        self._reader = reader
        self._slots = slots
        self._count = min(threads, MOST_THREADS)
        self._files = FileDescriptorCache(partial(open_for_reading, direct=direct))
        self._in_place = slab is not None
        self._slab: Slab | HostSlots | None = slab
        self._in_use: Collection[int] = ()
        """Slots of the latest batch."""
        self._threads: list[Thread] = []
        self._queue: SimpleQueue[_Ahead | None] = SimpleQueue()
        self._end = weakref.finalize(self, _end, self._queue, self._threads)
        self._hinted: dict[tuple[int, int], _Ahead] = {}
        self._ended: list[_Ahead] = []  # perhaps still being read: their slots are not free yet

    def fetch(self, layer: int, experts: Sequence[int]) -> tuple[Slab, dict[int, int], StoreStats]:
        """Bring distinct ``experts`` into slots of the slab, valid until the next call; counts as ``read`` does.

        Raises:
            ExpertReadError: an expert could not be read.
        """
        slab = self._slab
        assert isinstance(slab, Slab)
        ahead = self._claim(layer, experts)
        taken = {job.slot for job in self._ended if job.writing} | {job.slot for job in ahead.values()}
        free = (slot for slot in range(slab.count) if slot not in taken)
        slots = {expert: ahead[expert].slot if expert in ahead else next(free) for expert in experts}
        self._in_use = frozenset(slots.values())
        done = self._load(layer, list(zip(slots, slab.rows(list(slots.values())), strict=True)), ahead)
        return slab, slots, done

    def read(self, layer: int, places: Mapping[int, int], filling: Filling) -> StoreStats:
        """Bring each expert of ``places`` to its slot there, a slot of ``filling``.

        Returns the reads and bytes, ``prefetched`` and ``bytes_wasted``. Whatever happens, nothing is written to
        ``filling`` any more when this returns; it is left to the caller to commit.

        Raises:
            ExpertReadError: an expert could not be read.
        """

        def move(expert: int, job: _Ahead) -> None:
            assert self._slab is not None  # the job has a slot of it
            filling.move(places[expert], self._slab, job.slot)

        wanted = [(expert, filling.rows[slot]) for expert, slot in places.items()]
        return self._load(layer, wanted, self._claim(layer, places), move)

    def _claim(self, layer: int, experts: Iterable[int]) -> "dict[int, _Ahead]":
        """Return the prefetches of ``experts`` that have begun, by expert; cancel all other prefetches."""
        hinted = self._hinted
        ahead = {expert: hinted[layer, expert] for expert in experts if (layer, expert) in hinted}
        ahead = {expert: job for expert, job in ahead.items() if job.begun}
        self._cancel(set(hinted.values()).difference(ahead.values()))
        self._ended += ahead.values()
        self._hinted = {}
        return ahead

    def _load(
        self,
        layer: int,
        wanted: Sequence[tuple[int, memoryview]],
        ahead: "Mapping[int, _Ahead]",
        move: "Callable[[int, _Ahead], None] | None" = None,
    ) -> StoreStats:
        """Read experts that were not prefetched; ``move`` places prefetched ones unless served in place."""
        done = self._read(layer, [(expert, row) for expert, row in wanted if expert not in ahead])
        failed = []
        for expert, row in wanted:
            job = ahead.get(expert)
            if job is None:
                continue
            job.finished.wait()
            if not job.complete:
                failed.append((expert, row))
                continue
            if move is not None:
                move(expert, job)
            job.used = True
            done += StoreStats(reads=job.reads, bytes_read=job.nbytes, prefetched=1)
        done += self._read(layer, failed)
        return done + StoreStats(bytes_wasted=self._wasted())

    def _read(self, layer: int, wanted: Sequence[tuple[int, memoryview]]) -> StoreStats:
        if not wanted:
            return StoreStats()
        reads, nbytes = self._reader.read(layer, wanted)
        return StoreStats(reads=reads, bytes_read=nbytes)

    def advise(self, layer: int, experts: Iterable[int]) -> None:
        """Begin to read ``experts`` ahead, as many as a batch may have, without waiting.

        Raises:
            InputError: there is no memory for them.
            BackendUnavailableError: no thread can be started.
        """
        slab = self._started()
        wanted = {(layer, expert): None for expert in experts}
        kept = {place: job for place, job in self._hinted.items() if place in wanted}
        self._cancel(set(self._hinted.values()).difference(kept.values()))
        self._hinted = kept
        taken = {job.slot for job in kept.values()} | {job.slot for job in self._ended if job.writing}
        free = [slot for slot in range(slab.count) if slot not in taken and slot not in self._in_use]
        new = [place for place in wanted if place not in kept][: max(0, self._slots - len(taken))]
        for place, slot in zip(new, free, strict=False):
            row = slab.rows([slot])[0]
            job = _Ahead(slot, row, list(plan_reads(self._source, layer, [(place[1], row)], _CHUNK)))
            self._hinted[place] = job
            self._queue.put(job)

    def close(self) -> StoreStats:
        """End threads and reads, close files and reader; return the wasted bytes. May be called again."""
        self._cancel(self._hinted.values())
        self._hinted = {}
        self._end()
        for thread in self._threads:
            thread.join()
        self._reader.close()
        self._files.close()
        return StoreStats(bytes_wasted=self._wasted())

    def _started(self) -> Slab | HostSlots:
        record = self._source.layout.record_bytes
        if self._slab is None:
            self._slab = HostSlots(self._slots, record, CopyBuffer(record))
        elif self._in_place and self._slab.count < 2 * self._slots:
            self._slab = Slab(2 * self._slots, record)
        try:
            while len(self._threads) < self._count:
                name = f"expert-read-ahead-{len(self._threads)}"
                thread = Thread(target=_serve, args=(self._queue, self._files), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            if not self._threads:
                raise BackendUnavailableError(
                    f"cannot start a thread to read ahead: {error}; set prefetch=none", code="no_threads"
                ) from error
        return self._slab

    def _cancel(self, jobs: Iterable["_Ahead"]) -> None:
        for job in jobs:
            job.cancelled = True
            self._ended.append(job)

    def _wasted(self) -> int:
        """Count the bytes of ended reads that no request wanted, each read once."""
        writing: list[_Ahead] = []
        over: list[_Ahead] = []
        for job in self._ended:  # asked once each: a read may end at any moment
            (writing if job.writing else over).append(job)
        self._ended = writing
        return sum(job.nbytes for job in over if not job.used)


@dataclass(eq=False, slots=True)
class _Ahead:
    """A record on its way into a slot. The thread writes the first group of flags, the owner the second."""

    slot: int
    row: memoryview
    plan: list[Read]

    begun: bool = False
    complete: bool = False
    reads: int = 0
    nbytes: int = 0
    finished: Event = field(default_factory=Event)

    cancelled: bool = False
    used: bool = False

    @property
    def writing(self) -> bool:
        """Whether the slot may still be written to; a read cancelled before it began does not write."""
        return not self.finished.is_set() and (self.begun or not self.cancelled)

    def run(self, files: FileDescriptorCache) -> None:
        """Read, unless cancelled; an error leaves it incomplete, and the fetch that wants the expert reads again."""
        self.begun = True
        try:
            for read in self.plan:
                if self.cancelled:
                    return
                self.reads += read_exactly(files[read.path], read.view, read.offset)
                self.nbytes += len(read.view)
            self.complete = self.nbytes == total_bytes(self.plan)
        except Exception:  # whatever it is, the next read ahead needs this thread
            _log.debug("read ahead of expert %s failed", self.plan[0].expert, exc_info=True)
        finally:
            self.finished.set()


def _serve(queue: "SimpleQueue[_Ahead | None]", files: FileDescriptorCache) -> None:
    while (job := queue.get()) is not None:
        job.run(files)
        del job  # while this waits, it must not keep alive what will end it


def _end(queue: "SimpleQueue[_Ahead | None]", threads: Sequence[Thread]) -> None:
    for _ in threads:
        queue.put(None)
