"""Replay expert requests against stores and measure the throughput of storage; no model runs.

A pass opens a store and replays the requests of one round, token by token and layer by layer, as decoding would. Only
the time inside a fetch counts, until MLX has the experts in one slab. In each round every contender replays the same
requests. Contenders run in reverse order in every second round, so that a drift of the machine affects all alike.

Conditions: before a cold pass the files of the pack are dropped from the page cache, and the drop is checked; an expert
that a pass requests twice may then come from the page cache. Before a warm pass every expert that it will request is
read into the page cache.
"""

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.research.intervals import median_interval
from flashmoe_mlx.stores.contract import ExpertStore, StoreStats
from flashmoe_mlx.stores.page_cache import cached_bytes, evict

CONDITIONS = ("cold", "warm")
_BLOCK = 8 * 2**20


@dataclass(frozen=True)
class Pass:
    """One contender's measurements in one round.

    Attributes:
        contender: its label.
        condition: "cold" or "warm".
        round: number of the round, from 0.
        latencies: seconds of each fetch of all experts of a token in a layer.
        seconds: sum of the latencies.
        cpu_seconds: CPU time of this process, user and system, including kernel threads that work for it.
        nbytes: record bytes delivered.
        cached: share of the requested bytes that was in the page cache at the start.
        stats: the store's counters for this pass.
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
        """Delivered bytes a second."""
        return self.nbytes / self.seconds


class Contender(Protocol):
    """A program or store that can replay requests."""

    label: str
    conditions: Sequence[str]

    def check(self) -> None:
        """Raise an error now if this contender cannot run, before anything is measured."""
        ...

    def run(self, condition: str, number: int, requests: RoutingTrace, cached: float) -> Pass:
        """Replay ``requests``."""
        ...


class StoreContender:
    """A store, opened once for each pass."""

    conditions: Sequence[str] = CONDITIONS

    def __init__(self, label: str, opener: Callable[[], ExpertStore]) -> None:
        self.label = label
        self._opener = opener

    def check(self) -> None:
        """Open and close the store."""
        self._opener().close()

    def run(self, condition: str, number: int, requests: RoutingTrace, cached: float) -> Pass:
        """Replay ``requests`` and close the store."""
        latencies: list[float] = []
        nbytes = 0
        with self._opener() as store:
            record = store.layout.record_bytes
            before = store.stats()
            cpu = _cpu_seconds()
            for layer, experts in requests.decode_requests():
                spent = 0
                for first in range(0, len(experts), store.slots):
                    group = experts[first : first + store.slots]
                    start = time.perf_counter_ns()
                    store.fetch(layer, group).slab  # noqa: B018  # a mapping copies now
                    spent += time.perf_counter_ns() - start
                latencies.append(spent / 1e9)
                nbytes += record * len(experts)
            cpu = _cpu_seconds() - cpu
            stats = store.stats() - before
        return Pass(self.label, condition, number, tuple(latencies), sum(latencies), cpu, nbytes, cached, stats)


def replay(
    source: ExpertSource,
    contenders: Sequence[Contender],
    requests: Sequence[RoutingTrace],
    conditions: Sequence[str],
    announce: Callable[[str], object],
) -> Iterator[Pass]:
    """Run one round for each of ``requests`` and yield each pass when it ends.

    Args:
        source: the experts; its files are the ones that are dropped or warmed.
        contenders: run in this order in even rounds and in reverse order in odd ones.
        requests: one trace for each round.
        conditions: "cold", "warm", or both.
        announce: called with a description of each pass before it begins.

    Raises:
        InputError: a contender cannot run.
        FlashMoeError: files cannot be dropped from the page cache; see ``stores.page_cache.evict``.
        ExpertStoreError: reading failed.
    """
    for contender in contenders:
        contender.check()
    files = _files(source)
    if "cold" in conditions:
        evict(files)  # refused now rather than half-way
    for number, trace in enumerate(requests):
        for condition in conditions:
            for contender in contenders if number % 2 == 0 else contenders[::-1]:
                if condition not in contender.conditions:
                    continue
                announce(f"round {number + 1} of {len(requests)}, {condition}, {contender.label}")
                if condition == "cold":
                    evict(files)
                cached = _warm_up(source, files, trace) if condition == "warm" else 0.0
                yield contender.run(condition, number, trace, cached)


def _warm_up(source: ExpertSource, files: Sequence[Path], requests: RoutingTrace) -> float:
    """Read the requested experts into the page cache; return the share of their bytes that is there afterwards."""
    wanted = {(layer, expert) for layer, experts in requests.decode_requests() for expert in experts}
    extents = [extent for place in sorted(wanted) for extent in source.extents(*place)]
    for extent in extents:
        with extent.path.open("rb", buffering=0) as file:
            file.seek(extent.offset)
            left = extent.nbytes
            while left and (block := file.read(min(left, _BLOCK))):
                left -= len(block)
    return min(1.0, sum(map(cached_bytes, files)) / sum(extent.nbytes for extent in extents))


def _files(source: ExpertSource) -> list[Path]:
    places = ((layer, expert) for layer in range(source.num_layers) for expert in range(source.num_experts))
    return sorted({extent.path for place in places for extent in source.extents(*place)})


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True)
class Summary:
    """All passes of a contender in one condition.

    Attributes:
        contender: its label.
        condition: "cold" or "warm".
        rounds: number of passes.
        gb_per_second: delivered bytes, median over rounds.
        interval: 95 % interval of ``gb_per_second``; None for fewer than 3 rounds.
        ratio: rate relative to the first contender, median of ratios paired by round.
        ratio_interval: 95 % interval of ``ratio``.
        read_gb_per_second: bytes read from storage or page cache.
        iops: reads a second from storage or page cache.
        latency_ms: p5, p50 and p95 of a fetch.
        cpu_seconds_per_gb: CPU time for each delivered gigabyte.
        hit_rate: share of requests that the store served without reading; None without requests.
        cached: smallest share of a pass that was in the page cache before it began.
    """

    contender: str
    condition: str
    rounds: int
    gb_per_second: float
    interval: tuple[float, float] | None
    ratio: float
    ratio_interval: tuple[float, float] | None
    read_gb_per_second: float
    iops: float
    latency_ms: tuple[float, float, float]
    cpu_seconds_per_gb: float
    hit_rate: float | None
    cached: float

    def to_json(self) -> Mapping[str, Any]:
        """Return the fields as ``bench_io.json`` holds them."""
        return asdict(self)


def summarise(passes: Sequence[Pass]) -> list[Summary]:
    """Summarize each contender in each condition, in the order of their first passes."""
    groups: dict[tuple[str, str], list[Pass]] = {}
    for condition in CONDITIONS:
        for contender in dict.fromkeys(one.contender for one in passes if one.round == 0):
            found = [one for one in passes if (one.contender, one.condition) == (contender, condition)]
            if found:
                groups[contender, condition] = found
    first = {condition: found for (_, condition), found in reversed(groups.items())}
    return [_summary(found, first[condition]) for (_, condition), found in groups.items()]


def _summary(passes: Sequence[Pass], first: Sequence[Pass]) -> Summary:
    rates = [one.rate / 1e9 for one in passes]
    base = {one.round: one.rate for one in first}
    ratios = [one.rate / base[one.round] for one in passes if one.round in base]
    seconds = sum(one.seconds for one in passes)
    stats = sum((one.stats for one in passes), StoreStats())
    low, median, high = 1e3 * np.percentile(np.concatenate([one.latencies for one in passes]), (5, 50, 95))
    return Summary(
        contender=passes[0].contender,
        condition=passes[0].condition,
        rounds=len(passes),
        gb_per_second=float(np.median(rates)),
        interval=median_interval(rates),
        ratio=float(np.median(ratios)),
        ratio_interval=median_interval(ratios),
        read_gb_per_second=stats.bytes_read / seconds / 1e9,
        iops=stats.reads / seconds,
        latency_ms=(float(low), float(median), float(high)),
        cpu_seconds_per_gb=sum(one.cpu_seconds for one in passes) / (sum(one.nbytes for one in passes) / 1e9),
        hit_rate=stats.hits / stats.requests if stats.requests else None,
        cached=min(one.cached for one in passes),
    )


def best_over(passes: Sequence[Pass], label_of_reference: Callable[[str], bool]) -> tuple[str, str, list[float]] | None:
    """Compare the fastest store with the fastest reference program in the cold condition.

    Returns both labels and the ratio of their rates in each round; None if there is no store or no reference. Passes
    with cache hits are left out, since they did not read every byte that they delivered.
    """
    cold = [one for one in passes if one.condition == "cold" and not one.stats.hits]
    medians = {
        label: float(np.median([one.rate for one in cold if one.contender == label]))
        for label in dict.fromkeys(one.contender for one in cold)
    }
    stores = [label for label in medians if not label_of_reference(label)]
    references = [label for label in medians if label_of_reference(label)]
    if not stores or not references:
        return None
    store, reference = (max(labels, key=medians.__getitem__) for labels in (stores, references))
    base = {one.round: one.rate for one in cold if one.contender == reference}
    return (
        store,
        reference,
        [one.rate / base[one.round] for one in cold if one.contender == store and one.round in base],
    )


def repeats(requests: RoutingTrace) -> float:
    """Return the share of requests for an expert that an earlier request contained."""
    wanted = [(layer, expert) for layer, experts in requests.decode_requests() for expert in experts]
    return 1 - len(set(wanted)) / len(wanted)


def check_fits(trace: RoutingTrace, source: ExpertSource, name: str) -> None:
    """Raise InputError if ``trace`` and ``source`` differ in the number of layers or experts."""
    layers = trace.experts.shape[1]
    if (layers, trace.num_experts) != (source.num_layers, source.num_experts):
        raise InputError(
            f"{name}: recorded with {layers} layers of {trace.num_experts} experts; this model has "
            f"{source.num_layers} of {source.num_experts}",
            code="trace_of_another_model",
        )
