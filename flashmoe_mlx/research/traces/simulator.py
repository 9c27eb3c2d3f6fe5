"""Replay a routing trace through caches that hold no bytes, and through Belady's optimum.

The caches are those of ``backend=ram_hybrid`` (``SlotCache`` and its policies). They get the requests in the order in
which the engine makes them, chunked prefill included, so the counters equal those of a live store.

Belady's rule evicts the expert whose next use is furthest away. It is optimal for requests of several experts too,
since all experts of a request must be in slots at once: L. A. Belady, "A study of replacement algorithms for a
virtual-storage computer", IBM Systems Journal 5(2), 1966. No policy can do better on the trace, so it shows how much a
better policy could gain.
"""

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.stores.contract import StoreStats
from flashmoe_mlx.stores.policies import POLICIES, EvictionPolicy, make_policy
from flashmoe_mlx.stores.slot_cache import SlotCache

BELADY = "belady"
SIMULATED = (*POLICIES, BELADY)
SCOPES = ("layer", "global")
_NEVER = 2**62


@dataclass(frozen=True)
class CacheDesign:
    """A cache to simulate.

    Attributes:
        policy: one of ram_hybrid's policies, or "belady", which knows all future requests.
        slots: slots for each layer.
        scope: "layer" gives each layer its own slots, "global" joins them into one pool.
        fetch_slots: most experts of one fetch.
        prefill_chunk: tokens of the prompt that are requested together, as in the engine.

    Raises:
        InputError: there is no such policy or scope (codes "unknown_policy", "unknown_scope"), or a number is less than
            1 ("out_of_range").
    """

    policy: str
    slots: int
    scope: str = "layer"
    fetch_slots: int = 16
    prefill_chunk: int = 1024

    def __post_init__(self) -> None:
        if self.policy not in SIMULATED:
            raise InputError(
                f"policy={self.policy}: no such policy; there are {', '.join(SIMULATED)}", code="unknown_policy"
            )
        if self.scope not in SCOPES:
            raise InputError(f"scope={self.scope}: choose from {', '.join(SCOPES)}", code="unknown_scope")
        for name in ("slots", "fetch_slots", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1", code="out_of_range")

    @property
    def at_once(self) -> int:
        """Most experts of one fetch: ``fetch_slots``, or fewer if its layer has fewer slots."""
        return min(self.fetch_slots, self.slots)


class Predictor(Protocol):
    """Guesses the experts of a layer before its router has chosen them."""

    def guess(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Return distinct experts to prefetch before the router requests ``experts``."""
        ...


class SameAsLast:
    """A predictor that repeats the previous token's choice in the same layer."""

    def __init__(self) -> None:
        self._last: dict[int, list[int]] = {}

    def guess(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Return the experts of the previous token; none for the first token."""
        before = self._last.get(layer, [])
        self._last[layer] = list(experts)
        return before


class StatedAccuracy:
    """A predictor with a given accuracy: each of its guesses is right with probability ``accuracy``.

    It makes as many guesses as the request has experts; a wrong guess is a random expert outside the request. It
    stands for predictors that a trace cannot run, such as the next layer's router on this layer's residual.

    Raises:
        InputError: ``accuracy`` is not a probability; code "out_of_range".
    """

    def __init__(self, accuracy: float, num_experts: int, seed: int = 0) -> None:
        if not 0 <= accuracy <= 1:
            raise InputError(f"accuracy={accuracy}: must be from 0 to 1", code="out_of_range")
        self._accuracy = accuracy
        self._num_experts = num_experts
        self._random = np.random.default_rng(seed)

    def guess(self, layer: int, experts: Sequence[int]) -> list[int]:  # noqa: ARG002  # the form of a predictor
        """Return the correct guesses, then the wrong ones."""
        right = self._random.random(len(experts)) < self._accuracy
        guesses = [expert for expert, known in zip(experts, right, strict=True) if known]
        others = np.setdiff1d(np.arange(self._num_experts), experts)
        count = min(len(experts) - len(guesses), len(others))
        wrong: list[int] = self._random.choice(others, count, replace=False).tolist()
        return guesses + wrong


@dataclass(frozen=True)
class Replay:
    """The counters of a cache after a trace was replayed.

    Attributes:
        prefill: counters as a live store keeps them, without seconds; each miss counts as one read.
        decode: the same for decode. Prefetches are not requests: useful ones appear among the hits, and their reads
            do not appear.
        misses: [n] counts the fetches of decode that had n misses.
        guessed: guesses of the predictor.
        right: guesses that the request then contained.
        prefetched: guesses that had to be read.
        useful: prefetched experts that the request then contained.
    """

    prefill: StoreStats
    decode: StoreStats
    misses: npt.NDArray[np.int64]
    guessed: int = 0
    right: int = 0
    prefetched: int = 0
    useful: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Hit rate of decode; None without decoded tokens."""
        return self.decode.hits / self.decode.requests if self.decode.requests else None


def replay(
    trace: RoutingTrace, design: CacheDesign, predictor: Predictor | None = None, hot: RoutingTrace | None = None
) -> Replay:
    """Replay all requests of ``trace``, prompt included, through a cache that starts empty.

    Args:
        trace: the requests.
        design: the cache.
        predictor: prefetches before each fetch of decode; a guess counts as a use of its expert.
        hot: the trace from which policy "pinned" takes its experts; None for ``trace`` itself, which amounts to
            knowing the future.

    Raises:
        InputError: ``hot`` has another number of layers or experts (code "trace_of_another_model"), or a predictor is
            given for Belady's policy, which already knows all requests ("contradiction").
    """
    if predictor is not None and design.policy == BELADY:
        raise InputError(
            "policy=belady knows what will be asked for: nothing is left to prefetch", code="contradiction"
        )
    caches = _Caches(trace, design, trace if hot is None else hot)
    counted = _Counted()
    for request in requests(trace, design.at_once, design.prefill_chunk):
        if request.decoding and predictor is not None:
            counted.prefetch(caches, request, predictor.guess(request.layer, request.experts))
        counted.fetch(caches, request)
    return counted.replay(trace.record_bytes)


@dataclass(frozen=True, slots=True)
class Request:
    """One fetch: distinct ``experts`` of ``layer``, in ascending order as the engine requests them."""

    layer: int
    experts: tuple[int, ...]
    decoding: bool


def requests(trace: RoutingTrace, at_once: int, prefill_chunk: int) -> Iterator[Request]:
    """Yield the fetches of a generation with the choices of ``trace``, at most ``at_once`` experts in each."""
    starts = range(0, trace.prompt_tokens, prefill_chunk)
    chunks = [trace.experts[start : min(start + prefill_chunk, trace.prompt_tokens)] for start in starts]
    chunks += list(trace.experts[trace.prompt_tokens :, None])
    for number, chunk in enumerate(chunks):
        decoding = number >= len(starts)
        for layer in range(chunk.shape[1]):
            distinct = np.unique(chunk[:, layer]).tolist()
            for start in range(0, len(distinct), at_once):
                yield Request(layer, tuple(distinct[start : start + at_once]), decoding)


class _Caches:
    """One cache for each layer, or one for all layers, in which (layer, expert) pairs are numbered consecutively."""

    def __init__(self, trace: RoutingTrace, design: CacheDesign, hot: RoutingTrace) -> None:
        _, layers, _ = trace.experts.shape
        self._num_experts = trace.num_experts
        if (hot.experts.shape[1], hot.num_experts) != (layers, trace.num_experts):
            raise InputError(
                "policy=pinned: its trace was recorded with another number of layers or experts",
                code="trace_of_another_model",
            )
        self._pooled = design.scope == "global"
        capacity = min(design.slots, trace.num_experts) * (layers if self._pooled else 1)
        futures: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        if design.policy == BELADY:
            for request in requests(trace, design.at_once, design.prefill_chunk):
                futures[self._pool(request.layer)].append(self._keys(request.layer, request.experts))
        self._caches = []
        for pool in range(1 if self._pooled else layers):
            if design.policy == BELADY:
                policy: EvictionPolicy = Belady(futures[pool])
            else:
                policy = make_policy(design.policy, capacity, self._hottest(hot, pool))
            self._caches.append(SlotCache(capacity, policy))

    def _pool(self, layer: int) -> int:
        return 0 if self._pooled else layer

    def _hottest(self, hot: RoutingTrace, pool: int) -> list[int]:
        if not self._pooled:
            return hot.hot_experts(pool)
        _, layers, _ = hot.experts.shape
        keys = hot.experts.astype(np.int64) + np.arange(layers)[None, :, None] * self._num_experts
        counts = np.bincount(keys.ravel(), minlength=layers * self._num_experts)
        order: list[int] = np.argsort(-counts, kind="stable").tolist()
        return order

    def _keys(self, layer: int, experts: Sequence[int]) -> tuple[int, ...]:
        first = layer * self._num_experts if self._pooled else 0
        return tuple(first + expert for expert in experts)

    def place(self, layer: int, experts: Sequence[int]) -> tuple[int, int]:
        """Request ``experts``; return the numbers of misses and of evictions."""
        placement = self._caches[self._pool(layer)].place(self._keys(layer, experts))
        return len(placement.misses), placement.evictions

    def missing(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Return the members of ``experts`` without a slot."""
        cache = self._caches[self._pool(layer)]
        keys = self._keys(layer, experts)
        return [expert for expert, key in zip(experts, keys, strict=True) if key not in cache]


@dataclass
class _Counted:
    fetches: list[int] = field(default_factory=lambda: [0, 0])  # of prefill, of decode
    asked: list[int] = field(default_factory=lambda: [0, 0])
    missed: list[int] = field(default_factory=lambda: [0, 0])
    evicted: list[int] = field(default_factory=lambda: [0, 0])
    misses: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    guessed: int = 0
    right: int = 0
    prefetched: int = 0
    useful: int = 0

    def fetch(self, caches: _Caches, request: Request) -> None:
        missed, evicted = caches.place(request.layer, request.experts)
        stage = int(request.decoding)
        self.fetches[stage] += 1
        self.asked[stage] += len(request.experts)
        self.missed[stage] += missed
        self.evicted[stage] += evicted
        if request.decoding:
            self.misses[missed] += 1

    def prefetch(self, caches: _Caches, request: Request, guesses: Sequence[int]) -> None:
        guesses = guesses[: len(request.experts)]
        absent = caches.missing(request.layer, guesses)
        caches.place(request.layer, guesses)
        asked = frozenset(request.experts)
        self.guessed += len(guesses)
        self.right += len(asked.intersection(guesses))
        self.prefetched += len(absent)
        self.useful += len(asked.intersection(absent))

    def replay(self, record_bytes: int) -> Replay:
        counts = np.zeros(max(self.misses, default=0) + 1, np.int64)
        for misses, fetches in self.misses.items():
            counts[misses] = fetches
        stages = self._stage(0, record_bytes), self._stage(1, record_bytes)
        return Replay(*stages, counts, self.guessed, self.right, self.prefetched, self.useful)

    def _stage(self, stage: int, record_bytes: int) -> StoreStats:
        return StoreStats(
            fetches=self.fetches[stage],
            requests=self.asked[stage],
            hits=self.asked[stage] - self.missed[stage],
            misses=self.missed[stage],
            evictions=self.evicted[stage],
            reads=self.missed[stage],
            bytes_read=self.missed[stage] * record_bytes,
        )


class Belady(EvictionPolicy):
    """Evicts the expert whose next use is furthest away; among equals, the one with the smallest number.

    ``future`` lists, in order, every request that the cache will get.
    """

    def __init__(self, future: Iterable[Sequence[int]]) -> None:
        uses: dict[int, list[int]] = defaultdict(list)
        for time, request in enumerate(future):
            for expert in request:
                uses[expert].append(time)
        self._uses = {expert: iter([*times[1:], _NEVER]) for expert, times in uses.items()}
        self._next: dict[int, int] = {}  # of the experts in slots
        # (-next use, expert); entries of experts that have since been used or evicted are skipped.
        self._heap: list[tuple[int, int]] = []

    def _used(self, expert: int) -> None:
        self._next[expert] = next(self._uses[expert])
        heapq.heappush(self._heap, (-self._next[expert], expert))

    def hit(self, expert: int) -> None:
        self._used(expert)

    def insert(self, expert: int) -> None:
        self._used(expert)

    def evict(self, keep: Collection[int]) -> int:
        kept = []
        while True:
            entry = heapq.heappop(self._heap)
            expert = entry[1]
            if self._next.get(expert) != -entry[0]:
                continue
            if expert not in keep:
                break
            kept.append(entry)
        for entry in kept:
            heapq.heappush(self._heap, entry)
        del self._next[expert]
        return expert

    def drop(self, expert: int) -> None:
        raise NotImplementedError("a simulated read cannot fail")


def capacities(num_experts: int, k: int) -> list[int]:
    """Return slot counts for a curve: from one token's experts to all experts, in steps of a quarter to a third."""
    found = {min(k, num_experts), num_experts}
    size = num_experts
    while size > k:
        found |= {size, size * 3 // 4}
        size //= 2
    return sorted(slots for slots in found if slots >= k)
