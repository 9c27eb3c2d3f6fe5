"""Summarize the trials of ``io_bench``, and compare the fastest store with a reference program."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flashmoe_mlx.research.bench.io_bench import CONDITIONS, Trial
from flashmoe_mlx.research.intervals import median_interval, percentiles
from flashmoe_mlx.stores.contract import StoreStats


@dataclass(frozen=True)
class Summary:
    """All trials of one candidate in one condition.

    Attributes:
        contender: label of the candidate.
        condition: "cold" or "warm".
        rounds: number of trials.
        gb_per_second: rate of delivered bytes, median over rounds.
        interval: 95 % interval of ``gb_per_second``; None for fewer than 3 rounds.
        ratio: rate relative to the first candidate, median of the ratios paired by round.
        ratio_interval: 95 % interval of ``ratio``.
        read_gb_per_second: rate of bytes read from storage or the page cache.
        iops: reads per second from storage or the page cache.
        latency_ms: p5, p50 and p95 of the time for all experts of a token in a layer.
        cpu_seconds_per_gb: CPU time per delivered gigabyte.
        hit_rate: share of requests that the store served without reading; None without requests.
        page_cache_hit_rate: share of the bytes read that the page cache held before; None without a sample.
        cached: smallest share of requested bytes in the page cache at the start of a trial.
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
    page_cache_hit_rate: float | None
    cached: float

    def to_json(self) -> Mapping[str, Any]:
        """Return the summary in the form of ``bench_io.json``."""
        return asdict(self)


def summarize(trials: Sequence[Trial]) -> list[Summary]:
    """Return a summary for each condition and candidate, in the order of the first round."""
    groups: dict[tuple[str, str], list[Trial]] = {}
    labels = dict.fromkeys(trial.contender for trial in trials if trial.round == 0)
    for condition in CONDITIONS:
        for label in labels:
            group = [trial for trial in trials if (trial.contender, trial.condition) == (label, condition)]
            if group:
                groups[condition, label] = group
    first = {condition: group for (condition, _), group in reversed(groups.items())}
    return [_summarize_group(group, first[condition]) for (condition, _), group in groups.items()]


def _summarize_group(trials: Sequence[Trial], first: Sequence[Trial]) -> Summary:
    """Summarize the trials of a candidate, relative to ``first``, the trials of the first candidate."""
    rates = [trial.rate / 1e9 for trial in trials]
    base = {trial.round: trial.rate for trial in first}
    ratios = [trial.rate / base[trial.round] for trial in trials if trial.round in base]
    seconds = sum(trial.seconds for trial in trials)
    stats = sum((trial.stats for trial in trials), StoreStats())
    return Summary(
        contender=trials[0].contender,
        condition=trials[0].condition,
        rounds=len(trials),
        gb_per_second=float(np.median(rates)),
        interval=median_interval(rates),
        ratio=float(np.median(ratios)),
        ratio_interval=median_interval(ratios),
        read_gb_per_second=stats.bytes_read / seconds / 1e9,
        iops=stats.reads / seconds,
        latency_ms=percentiles([1e3 * latency for trial in trials for latency in trial.latencies], (5, 50, 95)),
        cpu_seconds_per_gb=sum(trial.cpu_seconds for trial in trials) / (sum(trial.nbytes for trial in trials) / 1e9),
        hit_rate=stats.hits / stats.requests if stats.requests else None,
        page_cache_hit_rate=stats.page_cache_hit_rate,
        cached=min(trial.cached for trial in trials),
    )


def compare_fastest(
    trials: Sequence[Trial], is_reference: Callable[[str], bool]
) -> tuple[str, str, list[float]] | None:
    """Compare the fastest store with the fastest reference program in the cold condition.

    Trials with cache hits are left out, since they did not read every byte that they delivered.

    Args:
        trials: the trials of all candidates.
        is_reference: tells whether a label is that of a reference program.

    Returns:
        The labels of the store and of the reference, and the ratios of their rates in each round; None if there is no
        store or no reference.
    """
    cold = [trial for trial in trials if trial.condition == "cold" and not trial.stats.hits]
    medians = {
        label: float(np.median([trial.rate for trial in cold if trial.contender == label]))
        for label in dict.fromkeys(trial.contender for trial in cold)
    }
    stores = [label for label in medians if not is_reference(label)]
    references = [label for label in medians if is_reference(label)]
    if not stores or not references:
        return None
    store, reference = (max(labels, key=medians.__getitem__) for labels in (stores, references))
    base = {trial.round: trial.rate for trial in cold if trial.contender == reference}
    ratios = [trial.rate / base[trial.round] for trial in cold if trial.contender == store and trial.round in base]
    return store, reference, ratios
