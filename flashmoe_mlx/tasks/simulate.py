"""``task=simulate``: what caches of any size would do with a recorded trace, and what the best possible one would."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from flashmoe_mlx.console.output import activity, print_table, show
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.research.figures import hit_rate_figure, save
from flashmoe_mlx.research.traces.cache_design import CacheDesign, capacities
from flashmoe_mlx.research.traces.curves import Curve, curves
from flashmoe_mlx.research.traces.predictors import FixedAccuracyPredictor, Predictor, PreviousTokenPredictor
from flashmoe_mlx.research.traces.routing import RoutingSummary, summarize
from flashmoe_mlx.research.traces.simulator import Replay, replay
from flashmoe_mlx.stores.memory import GIB
from flashmoe_mlx.tasks.shared.choices import check_choices
from flashmoe_mlx.tasks.shared.keys import TEXT, CommonConfig
from flashmoe_mlx.tasks.trace import summary_lines

SIMULATION_VERSION = 1
Prefetches = Sequence[tuple[str, Replay]]


@dataclass
class Config(CommonConfig):
    """Keys of ``task=simulate``."""

    trace: str | None = field(default=None, metadata=TEXT)
    policies: list[str] = field(default_factory=lambda: ["lru", "lfu", "s3fifo", "pinned", "belady"])
    scopes: list[str] = field(default_factory=lambda: ["layer"])
    slots: list[int] | None = None
    hot: str | None = field(default=None, metadata=TEXT)
    prefetch_accuracy: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.9])


def run(config: Config, run_dir: Path) -> None:
    """Replay, show tables, and leave ``simulate.json`` and ``hit_rates.png`` in ``run_dir``."""
    if config.trace is None:
        raise InputError("task=simulate needs trace=<file>; record one: task=trace")
    _check(config)
    trace = RoutingTrace.load(expand_path(config.trace))
    hot = None if config.hot is None else RoutingTrace.load(expand_path(config.hot))
    _, layers, k = trace.experts.shape
    slots = sorted(set(capacities(trace.num_experts, k) if config.slots is None else config.slots))
    if slots[-1] > trace.num_experts:
        raise InputError(f"slots={slots[-1]}: a layer has {trace.num_experts} experts", code="out_of_range")
    for policy in config.policies:  # refused now rather than after minutes
        for scope in config.scopes:
            CacheDesign(policy, slots[0], scope)
    predictors = _predictors(trace, config.prefetch_accuracy)
    with activity() as announce:
        found = list(curves(trace, config.policies, slots, config.scopes, hot=hot, announce=announce))
        beside = min((number for number in slots if number >= 2 * k), default=slots[-1])
        design = CacheDesign("lru", beside)
        prefetches = [(name, replay(trace, design, predictor)) for name, predictor in predictors]
    summary = summarize(trace)
    write_json(run_dir / "simulate.json", _record(config, trace, summary, found, beside, prefetches))
    show(trace.model)
    for line in summary_lines(summary, trace.prompt_tokens):
        show(line)
    show()
    print_table(_table(found, trace.record_bytes * layers))
    show()
    print_table(_prefetch_table(prefetches, beside))
    _save_figure(found, trace, run_dir)
    show(f"record: {run_dir}")


def _check(config: Config) -> None:
    """Refuse lists of nothing, and a trace that no policy would read."""
    for key in ("policies", "scopes", "slots"):
        check_choices(key, getattr(config, key))
    if config.hot is not None and "pinned" not in config.policies:
        raise InputError("hot= is read by policies=[pinned] alone, which is not among them", code="contradiction")


def _predictors(trace: RoutingTrace, accuracies: Sequence[float]) -> list[tuple[str, Predictor | None]]:
    stated = [(f"right {accuracy:.0%}", FixedAccuracyPredictor(accuracy, trace.num_experts)) for accuracy in accuracies]
    return [("none", None), ("same as the last token", PreviousTokenPredictor()), *stated]


def _record(
    config: Config,
    trace: RoutingTrace,
    summary: RoutingSummary,
    found: Sequence[Curve],
    beside: int,
    prefetches: Prefetches,
) -> dict[str, Any]:
    return {
        "simulation_version": SIMULATION_VERSION,
        "trace": {"path": config.trace, "model": trace.model, "prompt_xxh3": trace.prompt_xxh3, **asdict(summary)},
        "prompt_tokens": trace.prompt_tokens,
        "record_bytes": trace.record_bytes or None,
        "curves": [
            {
                "policy": curve.policy,
                "scope": curve.scope,
                "slots": slots,
                "hit_rate": one.hit_rate,
                "prefill": asdict(one.prefill),
                "decode": asdict(one.decode),
            }
            for curve in found
            for slots, one in zip(curve.slots, curve.replays, strict=True)
        ],
        "prefetch": {
            "slots": beside,
            "policies": {
                name: {
                    "decode": asdict(one.decode),
                    "guessed": one.guessed,
                    "right": one.right,
                    "prefetched": one.prefetched,
                    "useful": one.useful,
                }
                for name, one in prefetches
            },
        },
    }


def _new_table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _table(found: Sequence[Curve], layer_record_bytes: int) -> Table:
    """Return hit rates, with a column for each policy and scope."""
    names = [curve.policy + ("" if curve.scope == "layer" else " pool") for curve in found]
    sizes = ["slots a layer", *(["GiB"] if layer_record_bytes else [])]
    table = _new_table("hit rate of decode", [*sizes, *names])
    for row, slots in enumerate(found[0].slots):
        gib = [f"{slots * layer_record_bytes / GIB:.3g}"] if layer_record_bytes else []
        table.add_row(str(slots), *gib, *(f"{curve.hit_rates[row]:.1%}" for curve in found))
    return table


def _prefetch_table(prefetches: Prefetches, slots: int) -> Table:
    """Return what prefetching would save with an LRU cache per layer."""
    columns = ("guess", "right", "hits", "misses left", "reads in all", "of no use")
    table = _new_table(f"prefetching, per-layer LRU of {slots} slots", columns)
    table.columns[0].justify = "left"
    before = prefetches[0][1].decode.misses
    for name, one in prefetches:
        reads = one.decode.misses + one.prefetched
        table.add_row(
            name,
            f"{one.right / one.guessed:.0%}" if one.guessed else "-",
            f"{one.decode.hits / one.decode.requests:.1%}",
            f"{one.decode.misses / before:.0%}" if before else "-",
            f"{reads / before:.0%}" if before else "-",
            f"{(one.prefetched - one.useful) / one.prefetched:.0%}" if one.prefetched else "-",
        )
    return table


def _save_figure(found: Sequence[Curve], trace: RoutingTrace, run_dir: Path) -> None:
    _, layers, _ = trace.experts.shape
    try:
        save(hit_rate_figure(found, trace.model, trace.record_bytes * layers), run_dir / "hit_rates.png")
    except InputError as error:
        show(f"no hit_rates.png: {error}")
