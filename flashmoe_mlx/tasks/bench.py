"""``task=bench``: compare backends, K and prefetch policies in interleaved runs of the engine."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from flashmoe_mlx.console.output import activity, counted, print_notes, print_table, show
from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.formats.files import write_atomically
from flashmoe_mlx.moe.prefetch import check_policy
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.research.bench.engine_bench import (
    CONDITIONS,
    Configuration,
    Plan,
    Trial,
    find_unavailable,
    least_memory,
    run_trials,
)
from flashmoe_mlx.research.bench.engine_summary import Summary, summarize
from flashmoe_mlx.research.bench.memory_cap import memory_cap
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.research.figures import bench_figure, save
from flashmoe_mlx.research.intervals import format_interval
from flashmoe_mlx.tasks.shared.automatic import chosen
from flashmoe_mlx.tasks.shared.backend_list import listed_backends
from flashmoe_mlx.tasks.shared.choices import check_choices
from flashmoe_mlx.tasks.shared.keys import TEXT, PromptConfig
from flashmoe_mlx.tasks.shared.model import model_folder
from flashmoe_mlx.tasks.shared.prompts import with_prompt

_log = logging.getLogger(__name__)
BENCH_VERSION = 1
RECORD = "bench.json"
_MARK = "*"
"""Mark of a row to which a note below the table refers."""
_MORE_PROMPTS = (
    "Write four lines about a lighthouse in winter.",
    "How does a hash table find a key?",
    "List three uses of copper, with a reason each.",
)
"""Prompts that rotating rounds use in addition to ``prompt=``."""


@dataclass
class Config(PromptConfig):
    """Keys of ``task=bench``."""

    prefetch: str | None = None
    backends: list[Any] | None = None
    experts_ks: list[int] | None = None
    prefetches: list[str] | None = None
    conditions: list[str] = field(default_factory=lambda: ["cold", "warm"])
    prompts: list[str] | None = field(default=None, metadata=TEXT)
    tokens: int = 16
    rounds: int = 4
    memory_gib: float | None = None
    skip_unavailable: bool = False
    resume: str | None = field(default=None, metadata=TEXT)
    plot: bool = True


def run(config: Config, run_dir: Path) -> None:
    """Measure, show tables, and write ``bench.json`` and ``bench.png`` to ``run_dir``.

    After an error or an interrupt, the files hold the completed trials, and ``resume=<run_dir>`` continues from them.

    Raises:
        InputError: the keys contradict each other, or a configuration cannot run here.
        FlashMoeError: a configuration failed while it ran.
    """
    _check(config)
    plan = _plan(config)
    least = least_memory(plan.folder) if config.memory_gib is not None else 0
    with memory_cap(config.memory_gib, least) as cap:
        setup = _setup(config, plan, cap)
        left_out = find_unavailable(plan)
        if left_out and not config.skip_unavailable:
            raise InputError(f"{_listed(left_out)}; skip_unavailable=true compares the rest")
        plan = replace(plan, settings=[setting for setting in plan.settings if setting.label not in left_out])
        if not plan.settings:
            raise InputError(f"no configuration can run here: {_listed(left_out)}")
        trials = _resumed_trials(config, setup)
        failures: dict[str, str] = {}
        try:
            with activity() as announce:
                for trial in run_trials(plan, list(trials), announce, failures):
                    trials.append(trial)
                    _log.info("%s %s round %d: %.3f tokens/s", trial.setting, trial.condition, trial.round, trial.rate)
                    _write(run_dir, setup, trials, left_out, failures)
        finally:
            if trials:
                _write(run_dir, setup, trials, left_out, failures)
                _show(config, plan, trials, cap, run_dir)
            for label, reason in left_out.items():
                show(f"left out: {label}: {reason}")
    if failures:
        raise FlashMoeError(
            f"{len(failures)} of {counted(len(plan.settings), 'configuration')} failed: {_listed(failures)}"
        )


def _check(config: Config) -> None:
    for name in ("tokens", "rounds"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}={getattr(config, name)}: must be at least 1")
    native.extension()  # refuses wrong environment variables now, rather than as a failure of each configuration
    check_choices("conditions", config.conditions, CONDITIONS)
    for name in ("experts_ks", "prefetches"):
        check_choices(name, getattr(config, name))


def _plan(config: Config) -> Plan:
    configurations = []
    ks = [config.experts_k] if config.experts_ks is None else config.experts_ks
    policies = [config.prefetch or "none"] if config.prefetches is None else config.prefetches
    for policy in policies:
        check_policy(policy)
    for k in ks:
        for label, backend in listed_backends(config.backends, config.backend).items():
            for policy in policies:
                parts = [label, f"K={k}" if len(ks) > 1 else "", policy if len(policies) > 1 else ""]
                configurations.append(Configuration(" ".join(filter(None, parts)), backend, k, policy))
    folder = model_folder(config.model, *(configuration.backend for configuration in configurations))
    for place, each in enumerate(configurations):
        stated = config.prefetch if config.prefetches is None else each.prefetch
        found = chosen(each.backend, folder, config.model, each.experts_k, 0, stated)
        configurations[place] = replace(each, backend=found.backend, prefetch=found.prefetch)
    prompts = [with_prompt(config, folder).prompt] if config.prompts is None else config.prompts
    if config.prompts is None and "rotating" in config.conditions:
        prompts += _MORE_PROMPTS
    if not prompts or ("rotating" in config.conditions and len(prompts) < 2):
        raise InputError("prompts= needs at least one text, or two for conditions=[rotating]")
    return Plan(
        folder,
        configurations,
        config.conditions,
        prompts,
        config.raw,
        config.tokens,
        config.rounds,
        config.kernels,
        config.activations,
        config.kv_bits,
    )


def _setup(config: Config, plan: Plan, cap: str | None) -> dict[str, Any]:
    """Return the requested plan in the form in which ``bench.json`` holds it."""
    requested = {key: value for key, value in asdict(plan).items() if key != "rounds"}
    setup = {**requested, "folder": str(plan.folder), "memory_cap": cap, "memory_gib": config.memory_gib}
    parsed = json.loads(json.dumps(setup))
    assert isinstance(parsed, dict)
    return parsed


def _resumed_trials(config: Config, setup: Mapping[str, Any]) -> list[Trial]:
    """Return the trials of the run that ``resume`` names; its plan must equal ``setup`` but for the rounds."""
    if config.resume is None:
        return []
    path = expand_path(config.resume) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        earlier = record["setup"]
        trials = [
            Trial(**{**entry, "token_ids": tuple(entry["token_ids"]), "decode_steps": tuple(entry["decode_steps"])})
            for entry in record["passes"]
        ]
        summarize(trials)  # fails here if a value of the record has the wrong type
        changed = [key for key in setup if key != "memory_cap" and earlier.get(key) != setup[key]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"resume={config.resume}: no readable record of task=bench there ({error})",
            code="invalid_record",
        ) from None
    if changed:
        raise InputError(
            f"resume={config.resume}: that run had different {', '.join(changed)}; only rounds= may change",
            code="another_plan",
        )
    return trials


def _write(
    run_dir: Path,
    setup: Mapping[str, Any],
    trials: Sequence[Trial],
    left_out: Mapping[str, str],
    failures: Mapping[str, str],
) -> None:
    """Write the record of the completed trials to ``run_dir``.

    Args:
        run_dir: the directory of this run.
        setup: the plan.
        trials: the completed trials.
        left_out: the reason for each configuration that cannot run here.
        failures: the error of each configuration that failed.
    """
    record = {
        "bench_version": BENCH_VERSION,
        "setup": setup,
        "environment": environment(),
        "passes": [asdict(trial) for trial in trials],
        "summary": [summary.to_json() for summary in summarize(trials)],
        "left_out": left_out,
        "failures": failures,
    }
    write_atomically(run_dir / RECORD, json.dumps(record, indent=1, default=str).encode())


def _show(config: Config, plan: Plan, trials: Sequence[Trial], cap: str | None, run_dir: Path) -> None:
    """Show a table for each condition, and save the figure.

    Args:
        config: ``plot`` decides whether there is a figure.
        plan: the plan of the trials.
        trials: the completed trials.
        cap: a description of the limit on memory, if there is one.
        run_dir: the directory of this run.
    """
    summaries = summarize(trials)
    rounds = max(trial.round for trial in trials) + 1
    extent = f"{counted(rounds, 'round')} of {counted(plan.tokens, 'token')}"
    show(f"\n{plan.folder}: {extent}; memory: {cap or 'no limit'}")
    for condition in plan.conditions:
        shown = [summary for summary in summaries if summary.condition == condition]
        if shown:
            print_table(_table(condition, shown))
            for line in _prefetch_lines(shown):
                show(line)
            print_notes((note for summary in shown for note in summary.notes), prefix=f"{_MARK} ")
    if config.plot:
        try:
            save(bench_figure(summaries, f"{plan.folder.name}, {extent}"), run_dir / "bench.png")
        except InputError as error:
            show(f"no plot: {error}")
    show(f"record: {run_dir}")


def _table(condition: str, summaries: Sequence[Summary]) -> Table:
    cached = [summary.cached for summary in summaries]
    extremes = dict.fromkeys(f"{share:.0%}" for share in (min(cached), max(cached)))
    share = f", {' to '.join(extremes)} of the experts in the page cache at the start"
    note = "" if condition == "cold" else share
    part = "" if summaries[0].stage == "decode" else ", prefill only (tokens=1 decodes nothing)"
    table = Table(title=f"{condition}{note}{part}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("backend", no_wrap=True)
    for heading in (
        "tok/s", "x first", "ms p5/p50/p95", "MB/token", "hits", "page cache", "I/O hidden", "read GB/s",
        "weights GB/s", "I/O", "compute", "TTFT s",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        compute = 1 - summary.shares.get("io", 0.0) - summary.shares.get("other", 0.0)
        table.add_row(
            f"{summary.setting} {_MARK}" if summary.notes else summary.setting,
            f"{summary.tokens_per_second:.3g}{format_interval(summary.interval)}",
            "1"
            if summary.setting == summaries[0].setting
            else f"{summary.ratio:.3g}{format_interval(summary.ratio_interval)}",
            "/".join(f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}" for ms in summary.step_ms),
            f"{summary.bytes_per_token / 1e6:.4g}",
            _percent(summary.hit_rate),
            _percent(summary.page_cache_hit_rate),
            _percent(summary.io_hidden),
            "-" if summary.read_gb_per_second is None else f"{summary.read_gb_per_second:.2f}",
            "-" if summary.weights_gb_per_second is None else f"{summary.weights_gb_per_second:.2f}",
            _percent(summary.shares.get("io", 0.0)),
            _percent(compute),
            f"{summary.time_to_first_token:.3g}",
        )
    return table


def _prefetch_lines(summaries: Sequence[Summary]) -> Iterator[str]:
    for summary in summaries:
        if summary.accuracy is not None:
            yield (
                f"  {summary.setting}: {summary.accuracy:.0%} of the predictions correct, "
                f"{_percent(summary.prefetched)} of the reads started early, "
                f"{summary.wasted_bytes_per_token / 1e6:.3g} MB/token wasted"
            )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{label}: {reason}" for label, reason in reasons.items())
