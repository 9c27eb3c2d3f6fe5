"""Summarize the trials of ``engine_bench`` by configuration and condition."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flashmoe_mlx.research.bench.engine_bench import CONDITIONS, Trial
from flashmoe_mlx.research.intervals import median_interval, percentiles


@dataclass(frozen=True)
class Summary:
    """All trials of one configuration in one condition. Measurements are of ``stage`` unless stated otherwise.

    Attributes:
        setting: label of the configuration.
        condition: "cold", "warm" or "rotating".
        stage: "decode" or "prefill".
        experts_k: experts per token.
        rounds: number of trials.
        tokens_per_second: median over rounds.
        interval: 95 % interval of ``tokens_per_second``; None for fewer than 3 rounds.
        ratio: rate relative to the first configuration of the condition, median of the ratios paired by round.
        ratio_interval: 95 % interval of ``ratio``.
        step_ms: p5, p50 and p95 of the time per token.
        bytes_per_token: bytes read, mean over all tokens.
        hit_rate: share of requested experts that were in slots; None without requests.
        page_cache_hit_rate: share of the bytes read that the page cache held before; None without a sample.
        io_hidden: share of the time of fetches in which experts were computed while others were read; None without
            misses.
        read_gb_per_second: rate of reads during fetches.
        weights_gb_per_second: bytes of all used weights, divided by the whole time.
        shares: share of the time in each phase: "compute", "io" and so on.
        time_to_first_token: seconds, median.
        prefill_tokens_per_second: median.
        accuracy: share of correct guesses; None without prefetch.
        prefetched: share of misses that were prefetched; None without prefetch.
        wasted_bytes_per_token: prefetched bytes that no request used.
        cached: mean share of the experts' bytes in the page cache at the start.
        notes: remarks about kernels: kernels replaced after a failed check, or a missing extension.
    """

    setting: str
    condition: str
    stage: str
    experts_k: int
    rounds: int
    tokens_per_second: float
    interval: tuple[float, float] | None
    ratio: float
    ratio_interval: tuple[float, float] | None
    step_ms: tuple[float, float, float]
    bytes_per_token: float
    hit_rate: float | None
    page_cache_hit_rate: float | None
    io_hidden: float | None
    read_gb_per_second: float | None
    weights_gb_per_second: float | None
    shares: Mapping[str, float]
    time_to_first_token: float
    prefill_tokens_per_second: float
    accuracy: float | None
    prefetched: float | None
    wasted_bytes_per_token: float
    cached: float
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the summary in the form of ``bench.json``."""
        return asdict(self)


def summarize(trials: Sequence[Trial]) -> list[Summary]:
    """Return a summary for each condition and configuration, in the order of the first round."""
    groups: dict[tuple[str, str], list[Trial]] = {}
    labels = dict.fromkeys(trial.setting for number in (0, 1) for trial in trials if trial.round == number)
    for condition in CONDITIONS:
        for label in labels:
            group = [trial for trial in trials if (trial.setting, trial.condition) == (label, condition)]
            if group:
                groups[condition, label] = group
    first = {condition: group for (condition, _), group in reversed(groups.items())}
    return [_summarize_group(group, first[condition]) for (condition, _), group in groups.items()]


def _summarize_group(trials: Sequence[Trial], first: Sequence[Trial]) -> Summary:
    """Summarize the trials of a configuration, relative to ``first``, the trials of the first configuration."""
    base = {trial.round: trial.rate for trial in first}
    rates = [trial.rate for trial in trials]
    ratios = [trial.rate / base[trial.round] for trial in trials if trial.round in base]
    stages = [trial.record[trial.stage] for trial in trials]

    def total(name: str) -> float:
        return float(sum(stage[name] for stage in stages))

    seconds, tokens = total("seconds"), total("tokens")
    phases: Counter[str] = Counter()
    for stage in stages:
        phases.update(stage["phase_seconds"])
    steps = [step for trial in trials for step in trial.decode_steps or [trial.record["prefill"]["seconds"]]]
    guesses = [trial.record["guesses"] for trial in trials if trial.record["guesses"] is not None]
    predicted = sum(guess["predicted"] for guess in guesses)
    return Summary(
        setting=trials[0].setting,
        condition=trials[0].condition,
        stage=trials[0].stage,
        experts_k=trials[0].record["experts_k"],
        rounds=len(trials),
        tokens_per_second=float(np.median(rates)),
        interval=median_interval(rates),
        ratio=float(np.median(ratios)) if ratios else float("nan"),
        ratio_interval=median_interval(ratios),
        step_ms=percentiles([1e3 * step for step in steps], (5, 50, 95)),
        bytes_per_token=total("bytes_read") / tokens,
        hit_rate=_ratio(total("hits"), total("experts_requested")),
        page_cache_hit_rate=_ratio(total("sampled_cached_bytes"), total("sampled_bytes")),
        io_hidden=_io_hidden(stages),
        read_gb_per_second=_mean([stage["read_gb_per_second"] for stage in stages]),
        weights_gb_per_second=_mean([stage["weights_gb_per_second"] for stage in stages]),
        shares={phase: spent / seconds for phase, spent in phases.items()},
        time_to_first_token=float(np.median([trial.record["time_to_first_token"] for trial in trials])),
        prefill_tokens_per_second=float(np.median([trial.record["prefill"]["tokens_per_second"] for trial in trials])),
        accuracy=_ratio(sum(guess["right"] for guess in guesses), predicted),
        prefetched=_ratio(total("prefetched"), total("misses")) if guesses else None,
        wasted_bytes_per_token=total("bytes_wasted") / tokens,
        cached=float(np.mean([trial.cached for trial in trials])),
        notes=tuple(dict.fromkeys(note for trial in trials if (note := trial.record.get("note")))),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _io_hidden(stages: Sequence[Mapping[str, Any]]) -> float | None:
    """Compute the share over all ``stages`` that have misses."""
    reading = [stage for stage in stages if stage["misses"]]
    hidden = sum(stage.get("overlapped_seconds", 0.0) for stage in reading)  # resumed records may be older
    return _ratio(hidden, hidden + sum(stage["fetch_seconds"] for stage in reading))


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
