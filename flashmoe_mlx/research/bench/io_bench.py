"""Replay expert requests against stores and measure the throughput of storage; no model runs.

A trial opens a store and replays the requests of one round, token by token and layer by layer, as decoding would. Only
the time inside fetches counts, until MLX has the experts in one slab. In each round, all candidates replay the same
requests. The order of the candidates is reversed in every second round, so that a drift in the machine's speed affects
all of them equally.

Conditions:

- cold: before each trial, the files of the pack are evicted from the page cache, and the eviction is checked. If the
  trial requests an expert twice, the second read may be served by the page cache.
- warm: before each trial, the requested experts are read into the page cache.
"""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.research.bench.files import expert_files
from flashmoe_mlx.stores.contract import ExpertStore, StoreStats
from flashmoe_mlx.stores.page_cache import cached_bytes, evict

CONDITIONS = ("cold", "warm")
_BLOCK = 8 * 2**20


@dataclass(frozen=True)
class Trial:
    """Measurements of one candidate in one condition and round.

    Attributes:
        contender: label of the candidate.
        condition: "cold" or "warm".
        round: number of the round, from 0.
        latencies: seconds for all experts of a token in a layer, one entry for each token and layer.
        seconds: sum of the latencies.
        cpu_seconds: CPU time of this process, user and system, including kernel threads that work for it.
        nbytes: bytes of the delivered records.
        cached: share of the requested bytes in the page cache at the start.
        stats: counters of the store for this trial.
    """

    contender: str
    condition: str
    round: int
    latencies: tuple[float, ...]
    seconds: float
    cpu_seconds: float
    nbytes: int
    cached: float
    stats: StoreStats

    @property
    def rate(self) -> float:
        """Delivered bytes per second."""
        return self.nbytes / self.seconds


class Candidate(Protocol):
    """A program or store that can replay requests."""

    label: str
    conditions: Sequence[str]

    def check(self) -> None:
        """Raise an error if this candidate cannot run here; called before any measurement."""
        ...

    def run(self, condition: str, number: int, requests: RoutingTrace, cached: float) -> Trial:
        """Replay ``requests`` and return the measurements.

        Args:
            condition: "cold" or "warm", for the record.
            number: number of the round, from 0.
            requests: the experts to read.
            cached: share of the requested bytes in the page cache at the start, for the record.
        """
        ...


class StoreCandidate:
    """A store, opened by ``opener`` for each trial."""

    conditions: Sequence[str] = CONDITIONS

    def __init__(self, label: str, opener: Callable[[], ExpertStore]) -> None:
        self.label = label
        self._opener = opener

    def check(self) -> None:
        """Open and close the store."""
        self._opener().close()

    def run(self, condition: str, number: int, requests: RoutingTrace, cached: float) -> Trial:
        """Open the store, replay ``requests``, and close the store; see ``Candidate.run``."""
        latencies: list[float] = []
        nbytes = 0
        with self._opener() as store:
            layout = store.layout
            stats_at_start = store.stats()
            cpu = _cpu_seconds()
            for layer, experts in requests.decode_requests():
                spent = 0
                for first in range(0, len(experts), store.slots):
                    group = experts[first : first + store.slots]
                    start = time.perf_counter_ns()
                    store.fetch(layer, group).slab  # noqa: B018  # a memory-mapped store copies only now
                    spent += time.perf_counter_ns() - start
                latencies.append(spent / 1e9)
                nbytes += layout[layer].record_bytes * len(experts)
            cpu = _cpu_seconds() - cpu
            stats = store.stats() - stats_at_start
        return Trial(self.label, condition, number, tuple(latencies), sum(latencies), cpu, nbytes, cached, stats)


def replay(
    source: ExpertSource,
    candidates: Sequence[Candidate],
    requests: Sequence[RoutingTrace],
    conditions: Sequence[str],
    announce: Callable[[str], object],
) -> Iterator[Trial]:
    """Run one round for each of ``requests`` and yield each trial when it ends.

    Args:
        source: experts whose files are evicted or warmed up.
        candidates: run in this order in even rounds and in reverse order in odd rounds.
        requests: one trace for each round.
        conditions: "cold", "warm", or both.
        announce: called with a description of each trial before it begins.

    Raises:
        InputError: a candidate cannot run.
        FlashMoeError: the files cannot be evicted from the page cache; see ``stores.page_cache.evict``.
        ExpertStoreError: a read failed.
    """
    for candidate in candidates:
        candidate.check()
    files = expert_files(source)
    if "cold" in conditions:
        evict(files)  # fails before the first trial rather than after some of them
    for number, trace in enumerate(requests):
        for condition in conditions:
            for candidate in candidates if number % 2 == 0 else candidates[::-1]:
                if condition not in candidate.conditions:
                    continue
                announce(f"round {number + 1} of {len(requests)}, {condition}, {candidate.label}")
                if condition == "cold":
                    evict(files)
                cached = _warm_up(source, files, trace) if condition == "warm" else 0.0
                yield candidate.run(condition, number, trace, cached)


def _warm_up(source: ExpertSource, files: Sequence[Path], requests: RoutingTrace) -> float:
    """Read the requested experts into the page cache; return the share of their bytes that it then holds."""
    requested = {(layer, expert) for layer, experts in requests.decode_requests() for expert in experts}
    extents = [extent for layer, expert in sorted(requested) for extent in source.extents(layer, expert)]
    for extent in extents:
        with extent.path.open("rb", buffering=0) as file:
            file.seek(extent.offset)
            left = extent.nbytes
            while left and (block := file.read(min(left, _BLOCK))):
                left -= len(block)
    return min(1.0, sum(map(cached_bytes, files)) / sum(extent.nbytes for extent in extents))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def repeats(requests: RoutingTrace) -> float:
    """Return the share of requests for an expert that was requested before."""
    requested = [(layer, expert) for layer, experts in requests.decode_requests() for expert in experts]
    return 1 - len(set(requested)) / len(requested)


def check_fits(trace: RoutingTrace, source: ExpertSource, name: str) -> None:
    """Check that ``trace``, called ``name`` in errors, has the layers and experts of ``source``.

    Raises:
        InputError: the numbers differ (code "trace_of_another_model").
    """
    layers = trace.experts.shape[1]
    if (layers, trace.num_experts) != (source.num_layers, source.num_experts):
        raise InputError(
            f"{name}: recorded with {layers} layers of {trace.num_experts} experts; this model has "
            f"{source.num_layers} of {source.num_experts}",
            code="trace_of_another_model",
        )
