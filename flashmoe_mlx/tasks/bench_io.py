"""``task=bench_io``: throughput of storage with each backend, without computing a model."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from flashmoe_mlx.console.output import activity, counted, print_table, show
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.model_files import ModelFiles, open_model
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.research.bench.fio import LABEL, FioCandidate
from flashmoe_mlx.research.bench.io_bench import (
    CONDITIONS,
    Candidate,
    StoreCandidate,
    Trial,
    check_fits,
    repeats,
    replay,
)
from flashmoe_mlx.research.bench.io_summary import Summary, compare_fastest, summarize
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.research.intervals import format_interval, median_interval
from flashmoe_mlx.research.traces.random_traces import uniform_trace, zipf_trace
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.stores.registry import open_store
from flashmoe_mlx.tasks.shared.automatic import chosen_backend
from flashmoe_mlx.tasks.shared.backend_list import listed_backends
from flashmoe_mlx.tasks.shared.choices import check_choices
from flashmoe_mlx.tasks.shared.keys import TEXT, StoreConfig
from flashmoe_mlx.tasks.shared.model import model_folder

_log = logging.getLogger(__name__)
BENCH_VERSION = 1
_REQUESTS = ("uniform", "zipf", "trace")


@dataclass
class Config(StoreConfig):
    """Keys of ``task=bench_io``."""

    seed: int | None = None
    backends: list[Any] | None = None
    requests: str = "uniform"
    zipf_exponent: float = 1.0
    trace: str | None = field(default=None, metadata=TEXT)
    tokens: int = 8
    rounds: int = 6
    conditions: list[str] = field(default_factory=lambda: ["cold", "warm"])
    fio: bool = False


def run(config: Config, run_dir: Path) -> None:
    """Measure, show tables, and write ``bench_io.json`` to ``run_dir``, even if an error ends the measurement early."""
    _check(config)
    files = open_model(model_folder(config.model))
    candidates, source = _candidates(files, config)
    requests = _requests(config, source, files)
    k = requests[0].experts.shape[2]
    if config.fio:
        candidates += [FioCandidate(source, k, registered) for registered in (False, True)]
    trials: list[Trial] = []
    try:
        with activity() as announce:
            for trial in replay(source, candidates, requests, config.conditions, announce):
                trials.append(trial)
                rate = trial.rate / 1e9
                _log.info("%s %s round %d: %.3f GB/s", trial.contender, trial.condition, trial.round, rate)
    finally:
        if trials:
            write_json(run_dir / "bench_io.json", _record(config, files, source, requests, trials))
    record = round(source.layout.mean_record_bytes)
    show(
        f"\n{files.folder}: {counted(source.num_layers, 'layer')} of {source.num_experts} experts, "
        f"{record:,} bytes each{'' if record == source.layout.record_bytes else ' on average'}; "
        f"{counted(len(requests), 'round')} of {counted(requests[0].experts.shape[0], 'token')}, "
        f"{counted(k, 'expert')} per fetch, "
        f"{config.requests}, {repeats(requests[0]):.0%} of the requests repeated",
    )
    summaries = summarize(trials)
    for condition in config.conditions:
        print_table(_table(condition, [summary for summary in summaries if summary.condition == condition]))
    _compare_with_fio(trials)
    show(f"record: {run_dir}")


def _check(config: Config) -> None:
    if config.requests not in _REQUESTS:
        raise InputError(f"requests={config.requests}: choose from {', '.join(_REQUESTS)}")
    if (config.requests == "trace") != (config.trace is not None):
        raise InputError("requests=trace and trace=<file> must be used together")
    for name in ("tokens", "rounds"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}={getattr(config, name)}: must be at least 1")
    if config.seed is not None and config.seed < 0:
        raise InputError(f"seed={config.seed}: must be at least 0", code="out_of_range")
    if not 0 <= config.zipf_exponent <= 10:
        raise InputError(f"zipf_exponent={config.zipf_exponent}: must be from 0 to 10")
    if config.requests != "zipf" and config.zipf_exponent != Config.zipf_exponent:
        raise InputError("zipf_exponent= has an effect only with requests=zipf", code="contradiction")
    if config.requests == "trace" and config.seed is not None:
        raise InputError(
            "seed= has no effect with requests=trace, which reads the requests from the trace", code="contradiction"
        )
    check_choices("conditions", config.conditions, CONDITIONS)
    if config.fio and "cold" not in config.conditions:
        raise InputError("fio=true bypasses the page cache; add cold to conditions=")


def _candidates(files: ModelFiles, config: Config) -> tuple[list[Candidate], ExpertSource]:
    """Return the stores to measure, and the experts that all of them serve."""
    candidates: dict[str, Candidate] = {}
    sources: list[ExpertSource] = []
    for label, settings in listed_backends(config.backends, config.backend).items():
        settings = chosen_backend(settings, files.folder, config.model, config.experts_k)
        sources.append(files.variant(settings.get("variant")))
        candidates[label] = StoreCandidate(label, partial(_open_store, files, settings))
    if any(source != sources[0] for source in sources):
        raise InputError("backends: the entries read different variants; use one variant: {name:pread,variant:q2}")
    return list(candidates.values()), sources[0]


def _open_store(files: ModelFiles, settings: Mapping[str, Any]) -> ExpertStore:
    return open_store(files, settings, {})[0]


def _requests(config: Config, source: ExpertSource, files: ModelFiles) -> list[RoutingTrace]:
    """Return the requests of each round, which differ unless a recorded trace is too short."""
    if config.trace is not None:
        path = expand_path(config.trace)
        recorded = RoutingTrace.load(path)
        check_fits(recorded, source, str(path))
        if config.experts_k not in (None, recorded.experts.shape[2]):
            raise InputError(
                f"experts_k={config.experts_k}: the trace was recorded with {recorded.experts.shape[2]}",
                code="contradiction",
            )
        return [_part(recorded, number * config.tokens, config.tokens) for number in range(config.rounds)]
    k = files.config.experts_per_token if config.experts_k is None else config.experts_k
    if not 1 <= k <= source.num_experts:
        raise InputError(f"experts_k={k}: must be from 1 to {source.num_experts}, the experts of this model")
    shape = (config.tokens, source.num_layers, source.num_experts, k)
    seeds = [(config.seed or 0) * 1000 + number for number in range(config.rounds)]
    if config.requests == "zipf":
        return [zipf_trace(*shape, exponent=config.zipf_exponent, seed=seed) for seed in seeds]
    return [uniform_trace(*shape, seed=seed) for seed in seeds]


def _part(trace: RoutingTrace, start: int, tokens: int) -> RoutingTrace:
    """Return ``tokens`` decoded tokens of ``trace`` from index ``start`` on, wrapping around at its end."""
    decoded = trace.experts[trace.prompt_tokens :]
    if not len(decoded):
        raise InputError("trace: has no decoded tokens, only a prompt")
    picks = [(start + token) % len(decoded) for token in range(tokens)]
    return RoutingTrace(decoded[picks], trace.num_experts, 0, trace.model, trace.prompt_xxh3)


def _record(
    config: Config,
    files: ModelFiles,
    source: ExpertSource,
    requests: Sequence[RoutingTrace],
    trials: Sequence[Trial],
) -> dict[str, Any]:
    """Return the contents of ``bench_io.json``.

    Args:
        config: the configuration of the run.
        files: the model.
        source: the experts that the candidates read.
        requests: the requests of each round.
        trials: the completed trials.
    """
    return {
        "bench_version": BENCH_VERSION,
        "model": str(files.folder),
        "record_bytes": round(source.layout.mean_record_bytes),
        "expert_bytes_in_all": source.num_experts * source.layout.bytes_in_all_layers,
        "experts_k": requests[0].experts.shape[2],
        "repeats": repeats(requests[0]),
        "config": asdict(config),
        "environment": environment(),
        "passes": [asdict(trial) for trial in trials],
        "summary": [summary.to_json() for summary in summarize(trials)],
    }


def _table(condition: str, summaries: Sequence[Summary]) -> Table:
    cached = min((summary.cached for summary in summaries), default=0.0)
    note = "" if condition == "cold" or cached > 0.99 else f", only {cached:.0%} of the data fits into the page cache"
    table = Table(title=f"{condition}{note}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("backend", no_wrap=True)
    for heading in ("GB/s", "x first", "reads/s", "ms p5/p50/p95", "CPU s/GB", "hits", "page cache"):
        table.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        spread = "/".join(f"{ms:.0f}" if ms >= 100 else f"{ms:.2g}" for ms in summary.latency_ms)
        table.add_row(
            summary.contender,
            f"{summary.gb_per_second:.3g}{format_interval(summary.interval)}",
            "1"
            if summary.contender == summaries[0].contender
            else f"{summary.ratio:.3g}{format_interval(summary.ratio_interval)}",
            f"{summary.iops:.0f}",
            f"{spread}{'*' if summary.contender.startswith(LABEL) else ''}",
            f"{summary.cpu_seconds_per_gb:.2f}",
            "-" if summary.hit_rate is None else f"{summary.hit_rate:.0%}",
            "-" if summary.page_cache_hit_rate is None else f"{summary.page_cache_hit_rate:.0%}",
        )
    if any(summary.contender.startswith(LABEL) for summary in summaries):
        table.caption, table.caption_justify = "* latency of one record rather than of one fetch", "left"
    return table


def _compare_with_fio(trials: Sequence[Trial]) -> None:
    found = compare_fastest(trials, lambda label: label.startswith(LABEL))
    if found is None:
        return
    store, reference, ratios = found
    shown = f"{median(ratios):.2f}{format_interval(median_interval(ratios))}"
    show(f"cold, {store} / {reference}: {shown}")
