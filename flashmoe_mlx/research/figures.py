"""Figures that tasks save and notebooks show. They need matplotlib, which the extra ``research`` installs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe_mlx.errors import missing_extra
from flashmoe_mlx.paths import name_in_errors
from flashmoe_mlx.research.traces.curves import Curve

__all__ = [
    "COLORS",
    "NAMES",
    "QUALITY_PANELS",
    "bench_figure",
    "hit_rate_figure",
    "new_figure",
    "quality_figure",
    "save",
]

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from flashmoe_mlx.research.bench.engine_summary import Summary

COLORS = {
    "lru": "tab:blue",
    "lfu": "tab:orange",
    "s3fifo": "tab:green",
    "pinned": "tab:purple",
    "belady": "black",
}
"""The color of each eviction policy in figures."""
NAMES = {"lru": "LRU", "lfu": "LFU", "s3fifo": "S3-FIFO", "pinned": "pinned", "belady": "Belady's optimum"}
"""The name of each eviction policy in figures."""


def new_figure(width: float = 7, height: float = 4.2, columns: int = 1) -> "tuple[Figure, Sequence[Axes]]":
    """Return a new figure of ``width`` by ``height`` inches, and its ``columns`` axes side by side.

    A notebook shows the figure if it is the last value of a cell.

    Raises:
        InputError: matplotlib is not installed (code "missing_extra").
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("a figure", "research") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, panels


def hit_rate_figure(curves: Sequence[Curve], title: str = "", layer_record_bytes: int = 0) -> "Figure":
    """Plot the hit rate of decode over the capacity, one line per policy, dashed for one pool of slots.

    Args:
        curves: the hit rates.
        title: title of the figure.
        layer_record_bytes: bytes of one expert in all layers together; 0 if unknown.
    """
    figure, (axes,) = new_figure()
    for curve in curves:
        axes.plot(
            curve.slots,
            [100 * rate for rate in curve.hit_rates],
            color=COLORS.get(curve.policy),
            linestyle="--" if curve.scope == "global" else "-",
            marker="o",
            markersize=3,
            label=NAMES.get(curve.policy, curve.policy) + (", one pool" if curve.scope == "global" else ""),
        )
    axes.set_xscale("log", base=2)
    ticks: list[int] = []
    for slots in sorted({slots for curve in curves for slots in curve.slots}, reverse=True):
        if not ticks or ticks[-1] >= 1.4 * slots:
            ticks.append(slots)
    gib = [f"\n{slots * layer_record_bytes / 2**30:.2g}" if layer_record_bytes else "" for slots in ticks]
    axes.set_xticks(ticks, [f"{slots}{size}" for slots, size in zip(ticks, gib, strict=True)])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, 101)
    axes.set_xlabel("slots per layer" + (" / total GiB" if layer_record_bytes else ""))
    axes.set_ylabel("hit rate in decode, %")
    axes.set_title(title, loc="left", fontsize="medium", parse_math=False)  # a name may contain dollar signs
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    return figure


def bench_figure(summaries: "Sequence[Summary]", title: str = "") -> "Figure":
    """Plot the speed of each configuration with its interval and its share of I/O, one panel per condition."""
    conditions = list(dict.fromkeys(summary.condition for summary in summaries))
    labels = list(dict.fromkeys(summary.setting for summary in summaries))
    figure, panels = new_figure(4.2 * len(conditions) + 1.8, 0.42 * len(labels) + 1.6, len(conditions))
    fastest = max(summary.interval[1] if summary.interval else summary.tokens_per_second for summary in summaries)
    for condition, axes in zip(conditions, panels, strict=True):
        for summary in summaries:
            if summary.condition == condition:
                _bench_bar(axes, labels.index(summary.setting), summary, fastest)
        axes.set_xlim(0, 1.18 * fastest)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_yticks(range(len(labels)), labels if axes is panels[0] else [], parse_math=False)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("tokens per second")
        axes.set_title(condition, loc="left", fontsize="medium")
    shades = {"time to read experts": "tab:blue", "rest of the time": "lightsteelblue"}
    figure.legend(
        handles=[_patch(color, label) for label, color in shades.items()],
        loc="outside lower left", ncols=2, frameon=False, fontsize="small",
    )  # fmt: skip
    intervals = "; black: 95 % intervals of the median" if any(summary.interval for summary in summaries) else ""
    figure.suptitle(f"{title}{intervals}", fontsize="small", x=0.01, ha="left", parse_math=False)
    return figure


def _bench_bar(axes: "Axes", row: int, summary: "Summary", fastest: float) -> None:
    """Draw the bar of ``summary`` at ``row``; ``fastest`` is the largest value in the figure."""
    rate, reading = summary.tokens_per_second, summary.shares.get("io", 0.0)
    axes.barh(row, rate * reading, height=0.62, color="tab:blue")
    axes.barh(row, rate * (1 - reading), left=rate * reading, height=0.62, color="lightsteelblue")
    end = rate
    if summary.interval is not None:
        low, high = summary.interval
        axes.plot([low, high], [row, row], color="black", linewidth=1.5)
        end = max(rate, high)
    axes.text(end + 0.015 * fastest, row, f"{rate:.3g}", va="center", fontsize="small")


def _patch(color: str, label: str) -> "Patch":
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)


def save(figure: "Figure", path: Path) -> None:
    """Write ``figure`` to ``path`` as a PNG.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    with name_in_errors(path):
        figure.savefig(path, dpi=150)


QUALITY_PANELS = (
    ("kl", "KL divergence from the reference, nats per token"),
    ("questions", "correct answers, %"),
    ("json_valid", "valid JSON, %"),
    ("tool_calls", "correct tool calls, %"),
)
"""The measurements that ``quality_figure`` plots, with their labels."""


def quality_figure(cells: Sequence[Mapping[str, Any]]) -> "Figure":
    """Plot quality over experts per token, one line per variant; ``cells`` are those of ``evaluate.json``."""
    figure, axes = new_figure(width=13, height=3.6, columns=len(QUALITY_PANELS))
    variants = dict.fromkeys(_variant(cell) for cell in cells)
    for panel, (name, label) in zip(axes, QUALITY_PANELS, strict=True):
        for index, variant in enumerate(variants):
            variant_cells = [cell for cell in cells if _variant(cell) == variant]
            points = [(cell["setup"]["experts_k"], *_value(cell, name)) for cell in variant_cells if _value(cell, name)]
            if not points:
                continue
            ks, values, lows, highs = zip(*sorted(points), strict=True)
            # Shift the variants sideways, so that their intervals do not overlap.
            positions = [k + 0.12 * (index - (len(variants) - 1) / 2) for k in ks]
            (line,) = panel.plot(positions, values, marker="o", markersize=3, linewidth=1.2, label=variant)
            panel.vlines(positions, lows, highs, color=line.get_color(), alpha=0.35, linewidth=1)
        if name == "kl":
            panel.set_yscale("log")
        panel.set_xlabel("experts per token")
        panel.set_title(label, fontsize=9)
    axes[0].legend(frameon=False)
    return figure


def _variant(cell: Mapping[str, Any]) -> str:
    """Return the variant of the experts, or their bit width where the model has no variants."""
    setup = cell["setup"]
    return str(setup["backend"].get("variant") or f"{setup['experts']['bits'] or 'dense'}")


def _value(cell: Mapping[str, Any], name: str) -> tuple[float, float, float] | tuple[()]:
    """Return a value and the bounds of its interval; an empty tuple if the cell lacks the value."""
    if name == "kl":
        scored = cell.get("text") or cell.get("answers")
        if not scored or scored["kl"] <= 0:
            return ()
        low, high = scored["kl_interval"] or (scored["kl"], scored["kl"])
        return scored["kl"], low, high
    if name not in cell:
        return ()
    low, high = cell[name]["interval"]
    return 100 * cell[name]["share"], 100 * low, 100 * high
