"""``task=bench``: run the engine with several backends, K and prefetch policies in turns, and compare them."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from flashmoe_mlx.console.output import activity, print_notes, print_table, show
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
    run_trials,
)
from flashmoe_mlx.research.bench.engine_summary import Summary, summarize
from flashmoe_mlx.research.bench.memory_cap import memory_cap
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.research.figures import bench_figure, save
from flashmoe_mlx.tasks.shared.backend_list import listed_backends
from flashmoe_mlx.tasks.shared.choices import check_choices
from flashmoe_mlx.tasks.shared.keys import TEXT, PromptConfig
from flashmoe_mlx.tasks.shared.model import model_folder
from flashmoe_mlx.tasks.shared.prompts import with_prompt

log = logging.getLogger(__name__)
BENCH_VERSION = 1
RECORD = "bench.json"
_MARK = "*"
"""Beside a row about which there is a note."""
_OTHER_PROMPTS = (
    "Write four lines about a lighthouse in winter.",
    "How does a hash table find a key?",
    "List three uses of copper, with a reason each.",
)
"""What rotating rounds use beside the one prompt that was given."""


@dataclass
class Config(PromptConfig):
    """Keys of ``task=bench``."""

    prefetch: str = "none"
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
    """Measure, show tables, and leave ``bench.json`` and ``bench.png`` in ``run_dir``, also of what was done before an
    error or an interrupt; ``resume=<run_dir>`` goes on from there.
    """
    _check(config)
    plan = _plan(config)
    with memory_cap(config.memory_gib) as cap:
        setup = _setup(config, plan, cap)
        left_out = find_unavailable(plan)
        if left_out and not config.skip_unavailable:
            raise InputError(f"{_listed(left_out)}; skip_unavailable=true compares the others")
        plan = replace(plan, settings=[one for one in plan.settings if one.label not in left_out])
        if not plan.settings:
            raise InputError(f"nothing can run here: {_listed(left_out)}")
        passes = _earlier(config, setup)
        failures: dict[str, str] = {}
        try:
            with activity() as announce:
                for one in run_trials(plan, list(passes), announce, failures):
                    passes.append(one)
                    log.info("%s %s round %d: %.3f tokens/s", one.setting, one.condition, one.round, one.rate)
                    _write(run_dir, setup, passes, left_out, failures)
        finally:
            if passes:
                _write(run_dir, setup, passes, left_out, failures)
                _show(config, plan, passes, cap, run_dir)
            for label, reason in left_out.items():
                show(f"left out: {label}: {reason}")
    if failures:
        raise FlashMoeError(f"{len(failures)} of {len(plan.settings)} settings failed: {_listed(failures)}")


def _check(config: Config) -> None:
    for name in ("tokens", "rounds"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}={getattr(config, name)}: must be at least 1")
    native.extension()  # reads environment variables: a wrong one is no fault of a setting
    check_choices("conditions", config.conditions, CONDITIONS)
    for name in ("experts_ks", "prefetches"):
        check_choices(name, getattr(config, name))


def _plan(config: Config) -> Plan:
    settings = []
    ks = [config.experts_k] if config.experts_ks is None else config.experts_ks
    policies = [config.prefetch] if config.prefetches is None else config.prefetches
    for policy in policies:
        check_policy(policy)
    for k in ks:
        for label, backend in listed_backends(config.backends, config.backend).items():
            for policy in policies:
                parts = [label, f"K={k}" if len(ks) > 1 else "", policy if len(policies) > 1 else ""]
                settings.append(Configuration(" ".join(filter(None, parts)), backend, k, policy))
    backends = [one.backend for one in settings]
    folder = model_folder(config.model, *backends)
    prompts = [with_prompt(config, folder).prompt] if config.prompts is None else config.prompts
    if config.prompts is None and "rotating" in config.conditions:
        prompts += _OTHER_PROMPTS
    if not prompts or ("rotating" in config.conditions and len(prompts) < 2):
        raise InputError("prompts= needs at least one text, two for conditions=[rotating]")
    return Plan(folder, settings, config.conditions, prompts, config.raw, config.tokens, config.rounds, config.kernels)


def _setup(config: Config, plan: Plan, cap: str | None) -> dict[str, Any]:
    """Return what was asked for, as it reads after a trip through JSON."""
    asked = {key: value for key, value in asdict(plan).items() if key != "rounds"}
    stated = {**asked, "folder": str(plan.folder), "memory_cap": cap, "memory_gib": config.memory_gib}
    parsed = json.loads(json.dumps(stated))
    assert isinstance(parsed, dict)
    return parsed


def _earlier(config: Config, setup: Mapping[str, Any]) -> list[Trial]:
    """Return the passes of the run that ``resume`` names, which must have had the same plan."""
    if config.resume is None:
        return []
    path = expand_path(config.resume) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before = record["setup"]
        passes = [
            Trial(**{**one, "token_ids": tuple(one["token_ids"]), "decode_steps": tuple(one["decode_steps"])})
            for one in record["passes"]
        ]
        summarize(passes)  # reads everything that is read of a record
        changed = [key for key in setup if key != "memory_cap" and before.get(key) != setup[key]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"resume={config.resume}: there is no record of task=bench that can be read ({error})",
            code="invalid_record",
        ) from None
    if changed:
        raise InputError(
            f"resume={config.resume}: was asked for other {', '.join(changed)}; only rounds= may change",
            code="another_plan",
        )
    return passes


def _write(
    run_dir: Path,
    setup: Mapping[str, Any],
    passes: Sequence[Trial],
    left_out: Mapping[str, str],
    failures: Mapping[str, str],
) -> None:
    record = {
        "bench_version": BENCH_VERSION,
        "setup": setup,
        "environment": environment(),
        "passes": [asdict(one) for one in passes],
        "summary": [one.to_json() for one in summarize(passes)],
        "left_out": left_out,
        "failures": failures,
    }
    write_atomically(run_dir / RECORD, json.dumps(record, indent=1, default=str).encode())


def _show(config: Config, plan: Plan, passes: Sequence[Trial], cap: str | None, run_dir: Path) -> None:
    summaries = summarize(passes)
    rounds = max(one.round for one in passes) + 1
    show(
        f"\n{plan.folder}: {rounds} rounds of {plan.tokens} tokens; memory: {cap or 'not capped'}",
    )
    for condition in plan.conditions:
        shown = [one for one in summaries if one.condition == condition]
        if shown:
            print_table(_table(condition, shown))
            for line in _prefetch_lines(shown):
                show(line)
            print_notes((note for one in shown for note in one.notes), prefix=f"{_MARK} ")
    if config.plot:
        try:
            save(
                bench_figure(summaries, f"{plan.folder.name}, {rounds} rounds of {plan.tokens} tokens"),
                run_dir / "bench.png",
            )
        except InputError as error:
            show(f"no plot: {error}")
    show(f"record: {run_dir}")


def _table(condition: str, summaries: Sequence[Summary]) -> Table:
    cached = (
        f", {min(one.cached for one in summaries):.0%} to {max(one.cached for one in summaries):.0%} of the experts"
    )
    note = "" if condition == "cold" else f"{cached} in the page cache at the start"
    part = "" if summaries[0].stage == "decode" else ", the prompt alone (tokens=1 decodes nothing)"
    table = Table(title=f"{condition}{note}{part}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("backend", no_wrap=True)
    for heading in (
        "tok/s", "x first", "ms p5/p50/p95", "MB/token", "hits", "read GB/s", "all GB/s", "I/O", "compute", "first s",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for one in summaries:
        compute = 1 - one.shares.get("io", 0.0) - one.shares.get("other", 0.0)
        table.add_row(
            f"{one.setting} {_MARK}" if one.notes else one.setting,
            f"{one.tokens_per_second:.3g}{_bracketed(one.interval)}",
            "1" if one.setting == summaries[0].setting else f"{one.ratio:.3g}{_bracketed(one.ratio_interval)}",
            "/".join(f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}" for ms in one.step_ms),
            f"{one.bytes_per_token / 1e6:.4g}",
            _percent(one.hit_rate),
            "-" if one.read_gb_per_second is None else f"{one.read_gb_per_second:.2f}",
            "-" if one.weights_gb_per_second is None else f"{one.weights_gb_per_second:.2f}",
            _percent(one.shares.get("io", 0.0)),
            _percent(compute),
            f"{one.time_to_first_token:.3g}",
        )
    return table


def _prefetch_lines(summaries: Sequence[Summary]) -> Iterator[str]:
    for one in summaries:
        if one.accuracy is not None:
            yield (
                f"  {one.setting}: {one.accuracy:.0%} of the guesses right, {_percent(one.prefetched)} of the reads "
                f"begun ahead, {one.wasted_bytes_per_token / 1e6:.3g} MB/token read for nothing"
            )


def _bracketed(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.3g}, {interval[1]:.3g}]"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{label}: {reason}" for label, reason in reasons.items())
