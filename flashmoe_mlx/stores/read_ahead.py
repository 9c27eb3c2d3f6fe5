"""A reader that starts to read experts at a hint, before a request needs them."""

import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from threading import Thread

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.contract import BackendUnavailableError, StoreStats
from flashmoe_mlx.stores.delivery import Delivery
from flashmoe_mlx.stores.filling import Filling
from flashmoe_mlx.stores.host_slots import HostSlots
from flashmoe_mlx.stores.page_cache_sampler import PageCacheSampler
from flashmoe_mlx.stores.pinned import PinnedRows
from flashmoe_mlx.stores.prefetches import Prefetch, RingPrefetch, ThreadPrefetch
from flashmoe_mlx.stores.readers import ExpertReader
from flashmoe_mlx.stores.reads import FileDescriptorCache, open_for_reading, plan_reads
from flashmoe_mlx.stores.slab import Slab
from flashmoe_mlx.stores.uring_reader import UringReader

_log = logging.getLogger(__name__)

_Ready = Callable[[Sequence[int]], None]
"""Receives experts whose records are complete."""

MAX_THREADS = 8
_MOST_AHEAD = 32
"""Slots for prefetches; more would hold memory that no reader fills in time."""
_CHUNK = 2**22
"""Size of one read in bytes; small, so that a cancelled prefetch soon leaves the storage to requests."""


class ReadAhead:
    """A reader that also takes hints: it prefetches the hinted experts into separate slots.

    Only the latest hint counts: each hint and each request cancels all earlier prefetches that it does not need. If a
    prefetch fails, the request for that expert reads it again and reports any error. The first hint allocates the slots
    for prefetches and starts the threads.

    Args:
        source: the location of the experts.
        reader: reads the experts that were not prefetched; ``close`` closes it.
        slots: maximum number of experts in one request; there are as many simultaneous prefetches, up to 32.
        threads: number of threads for prefetches, limited to ``MAX_THREADS``.
        direct: whether prefetches bypass the page cache.
        slab: at least ``slots`` slots, from which ``fetch`` serves batches in place. The first hint replaces a slab
            without further slots for prefetches by a larger one. None if the caller uses ``read`` and its own slots.
        spare_rows: makes memory for prefetched experts, given their number; needed without ``slab``.
    """

    def __init__(
        self,
        source: ExpertSource,
        reader: ExpertReader,
        slots: int,
        threads: int,
        direct: bool = False,
        slab: Slab | None = None,
        spare_rows: "Callable[[int], HostSlots | PinnedRows] | None" = None,
    ) -> None:
        self._source = source
        self._reader = reader
        self._ring = reader if isinstance(reader, UringReader) else None
        self._slots = slots
        self._ahead = min(slots, _MOST_AHEAD)
        self._count = min(threads, MAX_THREADS)
        self._files = FileDescriptorCache(partial(open_for_reading, direct=direct))
        self._sampler = None if direct else PageCacheSampler(source)
        self._in_place = slab is not None
        self._slab: Slab | HostSlots | PinnedRows | None = slab
        self._spare_rows = spare_rows
        self._in_use: Collection[int] = ()
        """The slots of the latest batch, or slots from which its records may still be copied."""
        self._threads: list[Thread] = []
        self._queue: SimpleQueue[ThreadPrefetch | None] = SimpleQueue()
        self._end = weakref.finalize(self, _end, self._queue, self._threads)
        self._hinted: dict[tuple[int, int], Prefetch] = {}
        self._retired: list[Prefetch] = []  # claimed or cancelled; their slots are free once they no longer write

    def fetch(self, layer: int, experts: Sequence[int], delivery: Delivery) -> tuple[Slab, dict[int, int], StoreStats]:
        """Load distinct ``experts`` of ``layer`` into slots of the slab, where they stay valid until the next call.

        Returns the slab, the slot of each expert, and the counters that ``read`` returns. Experts are delivered as they
        arrive.

        Raises:
            ExpertReadError: an expert could not be read.
        """
        slab = self._slab
        assert isinstance(slab, Slab)
        ahead = self._claim(layer, experts)
        taken = {job.slot for job in self._retired if job.writing} | {job.slot for job in ahead.values()}
        free = (slot for slot in range(slab.count) if slot not in taken)
        slots = {expert: ahead[expert].slot if expert in ahead else next(free) for expert in experts}
        self._in_use = frozenset(slots.values())

        def ready(experts: Sequence[int]) -> None:
            delivery.deliver(experts, lambda: slab.batch([slots[expert] for expert in experts]))

        wanted = list(zip(slots, slab.rows(list(slots.values())), strict=True))
        return slab, slots, self._load(layer, wanted, ahead, ready if delivery.wanted else None)

    def read(self, layer: int, places: Mapping[int, int], filling: Filling, ready: _Ready | None = None) -> StoreStats:
        """Load experts of ``layer`` into slots of the caller, who then commits ``filling``.

        After this method returns or raises an error, nothing is written to ``filling``.

        Args:
            layer: a valid layer.
            places: the slot of each expert.
            filling: the memory of these slots.
            ready: called first with experts that need no read, possibly none, when all other experts are being read;
                then with further experts whose slots have been filled.

        Returns:
            The counters ``reads``, ``bytes_read``, ``prefetched``, ``bytes_wasted``, and the sampled bytes.

        Raises:
            ExpertReadError: an expert could not be read.
        """

        def move(expert: int, job: Prefetch) -> None:
            assert self._slab is not None  # the job has one of its slots
            filling.move(places[expert], self._slab, job.slot)

        def arrived(experts: Sequence[int]) -> None:
            filling.arrived([places[expert] for expert in experts])
            if ready is not None:
                ready(experts)

        wanted = [(expert, filling.rows[slot]) for expert, slot in places.items()]
        ahead = self._claim(layer, places)
        self._in_use = {job.slot for job in ahead.values()} if filling.copies_later else ()
        try:
            return self._load(layer, wanted, ahead, ready, arrived, move)
        except BaseException:
            filling.give_up()
            raise

    def _claim(self, layer: int, experts: Iterable[int]) -> dict[int, Prefetch]:
        """Return the running and finished prefetches of ``experts``, by expert; cancel all other prefetches."""
        hinted = self._hinted
        self._poll()
        ahead = {expert: hinted[layer, expert] for expert in experts if (layer, expert) in hinted}
        ahead = {expert: job for expert, job in ahead.items() if job.begun}
        self._cancel(set(hinted.values()).difference(ahead.values()))
        self._retired += ahead.values()
        self._hinted = {}
        return ahead

    def _load(
        self,
        layer: int,
        wanted: Sequence[tuple[int, memoryview]],
        ahead: Mapping[int, Prefetch],
        ready: _Ready | None,
        arrived: _Ready | None = None,
        move: Callable[[int, Prefetch], None] | None = None,
    ) -> StoreStats:
        """Load ``wanted``, pairs of an expert and its row in memory; return the counters.

        Args:
            layer: a valid layer.
            wanted: the experts and their rows.
            ahead: the prefetch of each expert that has one; all other experts are read now.
            ready: as for ``read``.
            arrived: called with experts that were read now; None for ``ready``.
            move: brings a prefetched expert to its row; None if batches are served in place.
        """
        finished = {expert: job for expert, job in ahead.items() if job.ended}
        done = _take(finished, move)  # first, so that a GPU fetches these records while others are read
        complete = [expert for expert, job in finished.items() if job.complete]

        def begun() -> None:
            nonlocal done
            if ready is not None:
                ready(complete)
            for expert, job in ahead.items():  # these reads began before those of this request
                if expert not in finished:
                    job.wait()
                    done += _take({expert: job}, move)
                    if job.complete and ready is not None:
                        ready([expert])

        rest = [(expert, row) for expert, row in wanted if expert not in ahead]
        if rest:
            read = self._read(layer, rest, arrived or ready, begun)
            done += read
        else:
            begun()
        failed = [(expert, row) for expert, row in wanted if expert in ahead and not ahead[expert].complete]
        done += self._read(layer, failed, arrived or ready)
        return done + StoreStats(bytes_wasted=self._wasted())

    def _read(
        self,
        layer: int,
        wanted: Sequence[tuple[int, memoryview]],
        arrived: _Ready | None,
        begun: Callable[[], None] | None = None,
    ) -> StoreStats:
        if not wanted:
            return StoreStats()
        sampled = self._sample(layer, [expert for expert, _ in wanted])
        reads, nbytes = self._reader.read(layer, wanted, arrived, begun)
        return replace(sampled, reads=reads, bytes_read=nbytes)

    def _sample(self, layer: int, experts: Sequence[int]) -> StoreStats:
        return StoreStats() if self._sampler is None else self._sampler.sample(layer, experts)

    def prefetch(self, layer: int, experts: Iterable[int]) -> None:
        """Start to prefetch as many of ``experts`` as a batch may have, and return at once.

        Raises:
            InputError: there is not enough memory for their slots (code "not_enough_memory").
            BackendUnavailableError: the system starts no thread (code "no_threads").
        """
        slab = self._started()
        self._poll()
        wanted = {(layer, expert): None for expert in experts}
        kept = {place: job for place, job in self._hinted.items() if place in wanted}
        self._cancel(set(self._hinted.values()).difference(kept.values()))
        self._hinted = kept
        taken = {job.slot for job in kept.values()} | {job.slot for job in self._retired if job.writing}
        free = [slot for slot in range(slab.count) if slot not in taken and slot not in self._in_use]
        new = [place for place in wanted if place not in kept][: max(0, self._ahead - len(taken))]
        for place, slot in zip(new, free, strict=False):
            if self._ring is not None and not self._ring.has_room:
                return
            row = slab.rows([slot])[0]
            # The job is known before its reads begin, so that an interrupt cannot free its slot too early.
            job = self._hinted[place] = self._prefetch_of(layer, place[1], slot, row)
            job.start()

    def _prefetch_of(self, layer: int, expert: int, slot: int, row: memoryview) -> Prefetch:
        """Return a prefetch of ``expert`` into ``row``, to be started."""
        sampled = self._sample(layer, [expert])
        if self._ring is not None:
            return RingPrefetch(slot, sampled, self._ring, self._ring.plan(layer, expert, row))
        plan = list(plan_reads(self._source, layer, [(expert, row)], _CHUNK))
        return ThreadPrefetch(slot, sampled, row, plan, self._queue)

    def _poll(self) -> None:
        """Notice which reads of the ring have ended."""
        if self._ring is not None:
            self._ring.poll()

    def close(self) -> StoreStats:
        """Cancel all prefetches, end the threads, and close the reader; return the wasted bytes.

        Later calls have no effect.
        """
        self._cancel(self._hinted.values())
        self._hinted = {}
        self._end()
        for thread in self._threads:
            thread.join()
        self._reader.close()
        self._files.close()
        if self._sampler is not None:
            self._sampler.close()
        return StoreStats(bytes_wasted=self._wasted())

    def _started(self) -> Slab | HostSlots | PinnedRows:
        """Allocate the slots for prefetches and start the threads, once; return the slots."""
        if self._slab is None:
            assert self._spare_rows is not None
            self._slab = self._spare_rows(self._ahead)
        elif self._in_place and self._slab.count < self._slots + self._ahead:
            self._slab = Slab(self._slots + self._ahead, self._source.layout.record_bytes)
        if self._ring is not None:
            return self._slab
        try:
            while len(self._threads) < self._count:
                name = f"expert-prefetch-{len(self._threads)}"
                thread = Thread(target=_serve, args=(self._queue, self._files), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            if not self._threads:
                raise BackendUnavailableError(
                    f"cannot start a thread for prefetches: {error}; set prefetch=none", code="no_threads"
                ) from error
        return self._slab

    def _cancel(self, jobs: Iterable[Prefetch]) -> None:
        for job in jobs:
            job.cancelled = True
            self._retired.append(job)

    def _wasted(self) -> int:
        """Return the bytes of finished prefetches that no request used, and forget these prefetches."""
        writing: list[Prefetch] = []
        finished: list[Prefetch] = []
        for job in self._retired:  # one look at each: a prefetch may end at any moment
            (writing if job.writing else finished).append(job)
        self._retired = writing
        return sum(job.nbytes for job in finished if not job.used)


def _take(finished: Mapping[int, Prefetch], move: Callable[[int, Prefetch], None] | None) -> StoreStats:
    """Use the complete prefetches of ``finished``, by expert; return the counters."""
    done = StoreStats()
    for expert, job in finished.items():
        if job.complete:
            if move is not None:
                move(expert, job)
            job.used = True
            done += replace(job.sampled, reads=job.reads, bytes_read=job.nbytes, prefetched=1)
    return done


def _serve(queue: "SimpleQueue[ThreadPrefetch | None]", files: FileDescriptorCache) -> None:
    while (job := queue.get()) is not None:
        job.run(files)
        del job  # its slot keeps the owner alive, whose finalizer ends this thread


def _end(queue: "SimpleQueue[ThreadPrefetch | None]", threads: Sequence[Thread]) -> None:
    for _ in threads:
        queue.put(None)
