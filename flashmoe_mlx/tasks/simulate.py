"""``task=simulate``: hit rates of caches of any size on a recorded trace, compared with the optimal cache."""

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
from flashmoe_mlx.research.traces.replay_page import write_replay_page
from flashmoe_mlx.research.traces.routing import RoutingSummary, summarize
from flashmoe_mlx.research.traces.simulator import Replay, replay
from flashmoe_mlx.stores.memory import GIB
from flashmoe_mlx.tasks.shared.choices import check_choices
from flashmoe_mlx.tasks.shared.keys import TEXT, CommonConfig
from flashmoe_mlx.tasks.shared.routing_lines import routing_lines

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
    html: str | None = field(default=None, metadata=TEXT)
    prefetch_accuracy: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.9])


def run(config: Config, run_dir: Path) -> None:
    """Replay the trace, show tables, and write ``simulate.json`` and ``hit_rates.png`` to ``run_dir``.

    With ``html``, also write a page that replays the trace in a browser.
    """
    if config.trace is None:
        raise InputError("task=simulate needs trace=<file>; task=trace records one")
    _check(config)
    trace = RoutingTrace.load(expand_path(config.trace))
    if config.html is not None:
        write_replay_page(expand_path(config.trace), expand_path(config.html))
    hot = None if config.hot is None else RoutingTrace.load(expand_path(config.hot))
    _, layers, k = trace.experts.shape
    slots = sorted(set(capacities(trace.num_experts, k) if config.slots is None else config.slots))
    if slots[-1] > trace.num_experts:
        raise InputError(f"slots={slots[-1]}: a layer has {trace.num_experts} experts", code="out_of_range")
    for policy in config.policies:  # refuse mistakes now rather than after minutes
        for scope in config.scopes:
            CacheDesign(policy, slots[0], scope)
    predictors = _predictors(trace, config.prefetch_accuracy)
    with activity() as announce:
        found = list(curves(trace, config.policies, slots, config.scopes, hot=hot, announce=announce))
        prefetch_slots = min((count for count in slots if count >= 2 * k), default=slots[-1])
        design = CacheDesign("lru", prefetch_slots)
        prefetches = [(name, replay(trace, design, predictor)) for name, predictor in predictors]
    summary = summarize(trace)
    write_json(run_dir / "simulate.json", _record(config, trace, summary, found, prefetch_slots, prefetches))
    show(trace.model)
    for line in routing_lines(summary, trace.prompt_tokens):
        show(line)
    show()
    print_table(_table(found, trace.record_bytes * layers))
    show()
    print_table(_prefetch_table(prefetches, prefetch_slots))
    _save_figure(found, trace, run_dir)
    show(f"record: {run_dir}")
    if config.html is not None:
        show(f"to replay the trace, open in a browser: {expand_path(config.html)}")


def _check(config: Config) -> None:
    """Check lists, and that a policy reads ``hot``.

    Raises:
        InputError: a list is empty or repeats a value, or no policy reads ``hot``.
    """
    for key in ("policies", "scopes", "slots"):
        check_choices(key, getattr(config, key))
    if config.hot is not None and "pinned" not in config.policies:
        raise InputError("hot= is read only by the policy pinned; add it to policies=", code="contradiction")


def _predictors(trace: RoutingTrace, accuracies: Sequence[float]) -> list[tuple[str, Predictor | None]]:
    stated = [(f"right {accuracy:.0%}", FixedAccuracyPredictor(accuracy, trace.num_experts)) for accuracy in accuracies]
    return [("none", None), ("same as the last token", PreviousTokenPredictor()), *stated]


def _record(
    config: Config,
    trace: RoutingTrace,
    summary: RoutingSummary,
    found: Sequence[Curve],
    prefetch_slots: int,
    prefetches: Prefetches,
) -> dict[str, Any]:
    """Return the contents of ``simulate.json``.

    Args:
        config: the configuration of the run.
        trace: the replayed trace.
        summary: its statistics.
        found: hit rates for each policy and scope.
        prefetch_slots: slots per layer of the caches with prefetching.
        prefetches: replays with each predictor.
    """
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
                "hit_rate": result.hit_rate,
                "prefill": asdict(result.prefill),
                "decode": asdict(result.decode),
            }
            for curve in found
            for slots, result in zip(curve.slots, curve.replays, strict=True)
        ],
        "prefetch": {
            "slots": prefetch_slots,
            "policies": {
                name: {
                    "decode": asdict(result.decode),
                    "guessed": result.guessed,
                    "right": result.correct,
                    "prefetched": result.prefetched,
                    "useful": result.useful,
                }
                for name, result in prefetches
            },
        },
    }


def _new_table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _table(found: Sequence[Curve], layer_record_bytes: int) -> Table:
    """Make the table of hit rates, with a column for each policy and scope.

    ``layer_record_bytes`` are the bytes of one slot in every layer; 0 if the trace does not say.
    """
    names = [curve.policy + ("" if curve.scope == "layer" else " global") for curve in found]
    sizes = ["slots/layer", *(["GiB"] if layer_record_bytes else [])]
    table = _new_table("hit rate in decode", [*sizes, *names])
    for row, slots in enumerate(found[0].slots):
        gib = [f"{slots * layer_record_bytes / GIB:.3g}"] if layer_record_bytes else []
        table.add_row(str(slots), *gib, *(f"{curve.hit_rates[row]:.1%}" for curve in found))
    return table


def _prefetch_table(prefetches: Prefetches, slots: int) -> Table:
    """Make the table of misses that each predictor would save, with an LRU cache of ``slots`` experts per layer."""
    columns = ("predictor", "correct", "hits", "misses", "reads", "wasted")
    table = _new_table(f"prefetching, LRU cache of {slots} slots per layer; misses and reads relative to none", columns)
    table.columns[0].justify = "left"
    baseline = prefetches[0][1].decode.misses
    for name, result in prefetches:
        reads = result.decode.misses + result.prefetched
        table.add_row(
            name,
            f"{result.correct / result.guessed:.0%}" if result.guessed else "-",
            f"{result.decode.hits / result.decode.requests:.1%}",
            f"{result.decode.misses / baseline:.0%}" if baseline else "-",
            f"{reads / baseline:.0%}" if baseline else "-",
            f"{(result.prefetched - result.useful) / result.prefetched:.0%}" if result.prefetched else "-",
        )
    return table


def _save_figure(found: Sequence[Curve], trace: RoutingTrace, run_dir: Path) -> None:
    _, layers, _ = trace.experts.shape
    try:
        save(hit_rate_figure(found, trace.model, trace.record_bytes * layers), run_dir / "hit_rates.png")
    except InputError as error:
        show(f"no hit_rates.png: {error}")
