"""Replay a routing trace through simulated caches, which count hits and misses but hold no bytes.

The caches are those of ``backend=ram_hybrid`` (``SlotCache`` and its policies), and Belady's optimum. They receive the
requests in the order in which the engine makes them, chunked prefill included, so the counters equal those of a live
store.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.research.traces.belady import Belady
from flashmoe_mlx.research.traces.cache_design import BELADY, CacheDesign
from flashmoe_mlx.research.traces.predictors import Predictor
from flashmoe_mlx.stores.contract import StoreStats
from flashmoe_mlx.stores.policies import EvictionPolicy, make_policy
from flashmoe_mlx.stores.slot_cache import SlotCache

__all__ = ["Replay", "Request", "replay", "requests"]


@dataclass(frozen=True)
class Replay:
    """The counters of a cache after a trace was replayed.

    Attributes:
        prefill: counters of prefill, as in a live store but without seconds; each miss counts as one read.
        decode: counters of decode. A prefetch is not a request: its read is not counted, and its expert is a hit if it
            is then requested.
        misses: ``misses[n]`` is the number of fetches in decode that had n misses.
        guessed: guesses of the predictor.
        correct: guesses that the request contained.
        prefetched: guesses that had to be read.
        useful: prefetched experts that the request contained.
    """

    prefill: StoreStats
    decode: StoreStats
    misses: npt.NDArray[np.int64]
    guessed: int = 0
    correct: int = 0
    prefetched: int = 0
    useful: int = 0

    @property
    def hit_rate(self) -> float | None:
        """The hit rate of decode; None without decoded tokens."""
        return self.decode.hits / self.decode.requests if self.decode.requests else None


def replay(
    trace: RoutingTrace, design: CacheDesign, predictor: Predictor | None = None, hot: RoutingTrace | None = None
) -> Replay:
    """Replay all requests of ``trace``, prompt included, through a cache that is empty at the start.

    Args:
        trace: the requests.
        design: the cache.
        predictor: source of prefetches before each fetch in decode; a guess counts as a use of its expert.
        hot: the trace from which policy "pinned" takes its experts. With None it is ``trace`` itself, so that the
            policy knows the future.

    Raises:
        InputError: ``hot`` has a different number of layers or experts (code "trace_of_another_model"), or the policy
            is Belady's, which has no use for a predictor ("contradiction").
    """
    if predictor is not None and design.policy == BELADY:
        raise InputError(
            "policy=belady already knows all future requests, so it cannot be combined with prefetch",
            code="contradiction",
        )
    caches = _Caches(trace, design, trace if hot is None else hot)
    counters = _Counters()
    for request in requests(trace, design.at_once, design.prefill_chunk):
        if request.decoding and predictor is not None:
            counters.prefetch(caches, request, predictor.guess(request.layer, request.experts))
        counters.fetch(caches, request)
    return counters.replay(trace.record_bytes)


@dataclass(frozen=True, slots=True)
class Request:
    """One fetch: distinct ``experts`` of ``layer``, in ascending order as in the engine."""

    layer: int
    experts: tuple[int, ...]
    decoding: bool


def requests(trace: RoutingTrace, at_once: int, prefill_chunk: int) -> Iterator[Request]:
    """Yield the fetches with which the engine would generate ``trace``.

    Args:
        trace: the choices of the routers.
        at_once: largest number of experts in one fetch.
        prefill_chunk: tokens of the prompt that are requested together.
    """
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
    """The simulated caches: one per layer, or one for all layers that numbers (layer, expert) pairs consecutively."""

    def __init__(self, trace: RoutingTrace, design: CacheDesign, hot: RoutingTrace) -> None:
        _, layers, _ = trace.experts.shape
        self._num_experts = trace.num_experts
        if (hot.experts.shape[1], hot.num_experts) != (layers, trace.num_experts):
            raise InputError(
                "policy=pinned: the trace of hot experts was recorded with a different number of layers or experts",
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
        """Request ``experts`` of ``layer``; return the number of misses and the number of evictions."""
        placement = self._caches[self._pool(layer)].place(self._keys(layer, experts))
        return len(placement.misses), placement.evictions

    def missing(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Return the members of ``experts`` that are not in slots."""
        cache = self._caches[self._pool(layer)]
        keys = self._keys(layer, experts)
        return [expert for expert, key in zip(experts, keys, strict=True) if key not in cache]


@dataclass
class _Counters:
    """Counters while a trace is replayed; the lists have one entry for prefill and one for decode."""

    fetches: list[int] = field(default_factory=lambda: [0, 0])
    requested: list[int] = field(default_factory=lambda: [0, 0])
    missed: list[int] = field(default_factory=lambda: [0, 0])
    evicted: list[int] = field(default_factory=lambda: [0, 0])
    misses: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    guessed: int = 0
    correct: int = 0
    prefetched: int = 0
    useful: int = 0

    def fetch(self, caches: _Caches, request: Request) -> None:
        """Count a request and place its experts in ``caches``."""
        missed, evicted = caches.place(request.layer, request.experts)
        stage = int(request.decoding)
        self.fetches[stage] += 1
        self.requested[stage] += len(request.experts)
        self.missed[stage] += missed
        self.evicted[stage] += evicted
        if request.decoding:
            self.misses[missed] += 1

    def prefetch(self, caches: _Caches, request: Request, guesses: Sequence[int]) -> None:
        """Count ``guesses`` at ``request`` and place them in ``caches``."""
        guesses = guesses[: len(request.experts)]
        absent = caches.missing(request.layer, guesses)
        caches.place(request.layer, guesses)
        requested = frozenset(request.experts)
        self.guessed += len(guesses)
        self.correct += len(requested.intersection(guesses))
        self.prefetched += len(absent)
        self.useful += len(requested.intersection(absent))

    def replay(self, record_bytes: int) -> Replay:
        """Return the results for experts of ``record_bytes`` bytes."""
        counts = np.zeros(max(self.misses, default=0) + 1, np.int64)
        for misses, fetches in self.misses.items():
            counts[misses] = fetches
        stages = self._stage(0, record_bytes), self._stage(1, record_bytes)
        return Replay(*stages, counts, self.guessed, self.correct, self.prefetched, self.useful)

    def _stage(self, stage: int, record_bytes: int) -> StoreStats:
        return StoreStats(
            fetches=self.fetches[stage],
            requests=self.requested[stage],
            hits=self.requested[stage] - self.missed[stage],
            misses=self.missed[stage],
            evictions=self.evicted[stage],
            reads=self.missed[stage],
            bytes_read=self.missed[stage] * record_bytes,
        )
