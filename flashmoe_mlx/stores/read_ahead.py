"""A reader that starts to read experts at a hint, before a request needs them."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.contract import StoreStats
from flashmoe_mlx.stores.delivery import Delivery
from flashmoe_mlx.stores.filling import Filling
from flashmoe_mlx.stores.guess_limit import GuessLimit
from flashmoe_mlx.stores.host_slots import HostSlots
from flashmoe_mlx.stores.page_cache_sampler import PageCacheSampler
from flashmoe_mlx.stores.pinned import PinnedRows
from flashmoe_mlx.stores.prefetches import Prefetch, PrefetchThreads, RingPrefetch, ThreadPrefetch
from flashmoe_mlx.stores.readers import ExpertReader
from flashmoe_mlx.stores.reads import Read, plan_reads, total_bytes
from flashmoe_mlx.stores.slab import Slab
from flashmoe_mlx.stores.uring_reader import UringReader

_Ready = Callable[[Sequence[int]], None]
"""Receives experts whose records are complete."""

MAX_THREADS = 8
_MOST_AHEAD = 32
"""Slots for prefetches; more would hold memory that no reader fills in time."""
_CERTAIN_CHUNK = 2**22
"""Size in bytes of one read of an expert that the next request will need."""
_GUESSED_CHUNK = 2**20
"""Size in bytes of one read of a guessed expert; small, so that a wrong guess soon leaves the storage to requests."""


class ReadAhead:
    """A reader that also takes hints: it prefetches the hinted experts into separate slots.

    Only the latest hint counts: each hint and each request stops all earlier prefetches that it does not need. If a
    prefetch fails, the request for that expert reads it again and reports any error. The first hint allocates the slots
    for prefetches and starts the threads.

    Requests come before guesses: a guess begins no more reads than usually end before the next request, and the
    request itself reads the part of a guessed record whose reads have not begun. A hint for the layer of the latest
    request is no guess: these are further experts of a prompt, and all of them are read at once.

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
        self._threads = PrefetchThreads(min(threads, MAX_THREADS), direct)
        self._sampler = None if direct else PageCacheSampler(source)
        self._in_place = slab is not None
        self._slab: Slab | HostSlots | PinnedRows | None = slab
        self._spare_rows = spare_rows
        self._in_use: Collection[int] = ()
        """The slots of the latest batch, or slots from which its records may still be copied."""
        self._hinted: dict[tuple[int, int], Prefetch] = {}
        self._retired: list[Prefetch] = []  # claimed or stopped; their slots are free once they have ended
        self._limit = GuessLimit()
        self._bound: bool | None = None
        """Whether the limit kept the latest guess from reading more; None without a guess since the latest request."""
        self._latest = -1
        """The layer of the latest request."""

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
        taken = {job.slot for job in self._retired if not job.ended} | {job.slot for job in ahead.values()}
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
        """Stop all prefetches; return those of ``experts`` that have begun, by expert."""
        hinted = self._hinted
        for job in hinted.values():
            job.stop()
        self._poll()
        ahead = {expert: hinted[layer, expert] for expert in experts if (layer, expert) in hinted}
        ahead = {expert: job for expert, job in ahead.items() if job.begun_bytes > 0}
        if self._bound is not None:
            self._learn([job for job in hinted.values() if job.begun], set(ahead.values()), self._bound)
        self._bound = None
        self._latest = layer
        self._retired += hinted.values()
        self._hinted = {}
        return ahead

    def _learn(self, jobs: Sequence[Prefetch], right: Collection[Prefetch], bound: bool) -> None:
        """Adapt the limit to the prefetches of a guess, of which the request needs ``right``."""
        begun, needed = sum(job.begun for job in jobs), sum(job.begun for job in right)
        ended = begun - sum(job.running for job in jobs)
        late = any(job.running for job in jobs if job not in right)
        self._limit.learn(needed, begun - needed, ended, late, bound)

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
            ahead: the prefetch of each expert that has one; the rest of these records and all other experts are read
                now.
            ready: as for ``read``.
            arrived: called with experts that were read now; None for ``ready``.
            move: brings a prefetched expert to its row; None if batches are served in place.
        """
        rest = {expert: job for expert, job in ahead.items() if job.begun_bytes < job.size}
        complete = [expert for expert, job in ahead.items() if job.ended and expert not in rest and job.sound]
        done = _take([ahead[expert] for expert in complete])
        # First, so that a GPU fetches these records while others are read.
        self._move(complete, ahead, move)
        failed: list[int] = []

        def take(expert: int) -> None:
            """Use the prefetch of ``expert``, which has no read left to begin."""
            nonlocal done
            job = ahead[expert]
            job.wait()
            if not job.sound:
                failed.append(expert)
                return
            done += _take([job])
            self._move([expert], ahead, move)
            if ready is not None:
                ready([expert])

        def begun() -> None:
            if ready is not None:
                ready(complete)
            for expert in ahead:  # these reads began before those of this request
                if expert not in rest and expert not in complete:
                    take(expert)

        def arriving(experts: Sequence[int]) -> None:
            plain = [expert for expert in experts if expert not in rest]
            use = arrived or ready
            if plain and use is not None:
                use(plain)
            for expert in experts:
                if expert in rest:
                    take(expert)

        reading = [(expert, job.row) for expert, job in rest.items()]
        reading += [(expert, row) for expert, row in wanted if expert not in ahead]
        if reading:
            parts = {expert: job.begun_bytes for expert, job in rest.items()}
            announces = rest or arrived is not None or ready is not None
            read = self._read(layer, reading, arriving if announces else None, begun, parts)
            done += read  # not in one statement: the call changes ``done``
        else:
            begun()
        again = [(expert, row) for expert, row in wanted if expert in failed]
        done += self._read(layer, again, arrived or ready)
        return done + StoreStats(bytes_wasted=self._wasted())

    def _move(
        self, experts: Sequence[int], ahead: Mapping[int, Prefetch], move: Callable[[int, Prefetch], None] | None
    ) -> None:
        if move is not None:
            for expert in experts:
                move(expert, ahead[expert])

    def _read(
        self,
        layer: int,
        wanted: Sequence[tuple[int, memoryview]],
        arrived: _Ready | None,
        begun: Callable[[], None] | None = None,
        done: Mapping[int, int] | None = None,
    ) -> StoreStats:
        if not wanted:
            return StoreStats()
        sampled = self._sample(layer, [expert for expert, _ in wanted if not done or expert not in done])
        reads, nbytes = self._reader.read(layer, wanted, arrived, begun, done)
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
        certain = layer == self._latest
        wanted = {(layer, expert): None for expert in experts}
        kept = {place: job for place, job in self._hinted.items() if place in wanted}
        self._stop(set(self._hinted.values()).difference(kept.values()))
        self._poll()
        self._hinted = kept
        taken = {job.slot for job in kept.values()} | {job.slot for job in self._retired if not job.ended}
        free = [slot for slot in range(slab.count) if slot not in taken and slot not in self._in_use]
        new = [place for place in wanted if place not in kept][: max(0, self._ahead - len(taken))]
        room = None if certain else max(0, self._limit.reads - sum(job.running for job in kept.values()))
        bound = False
        for place, slot in zip(new, free, strict=False):
            if self._ring is not None and not self._ring.has_room:
                break
            row = slab.rows([slot])[0]
            plan = list(plan_reads(self._source, layer, [(place[1], row)], self._chunk(certain)))
            size = total_bytes(plan)
            if room is not None:
                bound = bound or len(plan) > room
                plan = plan[:room]
                room -= len(plan)
            if not plan:
                break
            # The job is known before its reads begin, so that an interrupt cannot free its slot too early.
            job = self._hinted[place] = self._prefetch_of(place, slot, row, size, plan)
            job.start()
        if new and not certain:
            self._bound = bound

    def _chunk(self, certain: bool) -> int:
        """Return the size of the reads of a hint; the user's limit applies to the ring."""
        size = _CERTAIN_CHUNK if certain else _GUESSED_CHUNK
        return size if self._ring is None or self._ring.chunk is None else min(size, self._ring.chunk)

    def _prefetch_of(
        self, place: tuple[int, int], slot: int, row: memoryview, size: int, plan: Sequence[Read]
    ) -> Prefetch:
        """Return a prefetch that makes ``plan``, the first reads of a record into ``row``; to be started.

        Args:
            place: the layer and the expert.
            slot: the slot of ``row``.
            row: memory for the record.
            size: bytes of the whole record.
            plan: the reads.
        """
        layer, expert = place
        sampled = self._sample(layer, [expert])
        if self._ring is not None:
            return RingPrefetch(slot, row, size, sampled, self._ring, self._ring.ahead(layer, expert, row, plan))
        return ThreadPrefetch(slot, row, size, sampled, plan, self._threads.queue)

    def _poll(self) -> None:
        """Notice which reads of the ring have ended."""
        if self._ring is not None:
            self._ring.poll()

    def close(self) -> StoreStats:
        """Cancel all prefetches, end the threads, and close the reader; return the wasted bytes.

        Later calls have no effect.
        """
        self._stop(self._hinted.values())
        self._hinted = {}
        self._threads.close()
        self._reader.close()
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
        if self._ring is None:
            self._threads.start()
        return self._slab

    def _stop(self, jobs: Iterable[Prefetch]) -> None:
        for job in jobs:
            job.stop()
            self._retired.append(job)

    def _wasted(self) -> int:
        """Return the bytes of ended prefetches that no request used, and forget these prefetches."""
        running: list[Prefetch] = []
        ended: list[Prefetch] = []
        for job in self._retired:  # one look at each: a prefetch may end at any moment
            (ended if job.ended else running).append(job)
        self._retired = running
        return sum(job.nbytes for job in ended if not job.used)


def _take(jobs: Iterable[Prefetch]) -> StoreStats:
    """Mark sound ``jobs`` as used; return their counters."""
    done = StoreStats()
    for job in jobs:
        job.used = True
        done += replace(job.sampled, reads=job.begun, bytes_read=job.nbytes, prefetched=1)
    return done
