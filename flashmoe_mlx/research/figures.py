"""Figures that tasks save and notebooks show. They need matplotlib, which comes with the extra ``research``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.paths import name_in_errors
from flashmoe_mlx.research.traces.curves import Curve

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
NAMES = {"lru": "LRU", "lfu": "LFU", "s3fifo": "S3-FIFO", "pinned": "pinned", "belady": "Belady's optimum"}


def new_figure(width: float = 7, height: float = 4.2, columns: int = 1) -> "tuple[Figure, Sequence[Axes]]":
    """Make a figure with ``columns`` axes side by side; a notebook shows it at the end of a cell.

    Raises:
        InputError: matplotlib is not installed; code "missing_package".
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "figures need matplotlib: pip install 'flashmoe_mlx[research]'", code="missing_package"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    return figure, list(axes)


def hit_rate_figure(curves: Sequence[Curve], title: str = "", layer_record_bytes: int = 0) -> "Figure":
    """Plot the hit rate of decode over capacity, one line for each policy; pooled slots are dashed.

    ``layer_record_bytes`` is the size of one slot in every layer, 0 if it is unknown.
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
    axes.set_xlabel("slots a layer" + (" / GiB in all" if layer_record_bytes else ""))
    axes.set_ylabel("hit rate of decode, %")
    axes.set_title(title, loc="left", fontsize="medium", parse_math=False)  # a name may hold dollars
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    return figure


def bench_figure(summaries: "Sequence[Summary]", title: str = "") -> "Figure":
    """Plot tokens per second of every setting with its interval and its split of the time, one panel per condition."""
    conditions = list(dict.fromkeys(one.condition for one in summaries))
    settings = list(dict.fromkeys(one.setting for one in summaries))
    figure, every = new_figure(4.2 * len(conditions) + 1.8, 0.42 * len(settings) + 1.6, len(conditions))
    fastest = max(one.interval[1] if one.interval else one.tokens_per_second for one in summaries)
    for condition, axes in zip(conditions, every, strict=True):
        for one in summaries:
            if one.condition == condition:
                _bench_bar(axes, settings.index(one.setting), one, fastest)
        axes.set_xlim(0, 1.18 * fastest)
        axes.set_ylim(len(settings) - 0.4, -0.6)
        axes.set_yticks(range(len(settings)), settings if axes is every[0] else [], parse_math=False)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("tokens a second")
        axes.set_title(condition, loc="left", fontsize="medium")
    shades = {"share of the time for reading experts": "tab:blue", "for everything else": "lightsteelblue"}
    figure.legend(
        handles=[_patch(color, label) for label, color in shades.items()],
        loc="outside lower left", ncols=2, frameon=False, fontsize="small",
    )  # fmt: skip
    intervals = "; black: 95 % intervals of the median" if any(one.interval for one in summaries) else ""
    figure.suptitle(f"{title}{intervals}", fontsize="small", x=0.01, ha="left", parse_math=False)
    return figure


def _bench_bar(axes: "Axes", row: int, one: "Summary", fastest: float) -> None:
    rate, reading = one.tokens_per_second, one.shares.get("io", 0.0)
    axes.barh(row, rate * reading, height=0.62, color="tab:blue")
    axes.barh(row, rate * (1 - reading), left=rate * reading, height=0.62, color="lightsteelblue")
    end = rate
    if one.interval is not None:
        low, high = one.interval
        axes.plot([low, high], [row, row], color="black", linewidth=1.5)
        end = max(rate, high)
    axes.text(end + 0.015 * fastest, row, f"{rate:.3g}", va="center", fontsize="small")


def _patch(color: str, label: str) -> "Patch":
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    with name_in_errors(path):
        figure.savefig(path, dpi=150)


QUALITY_PANELS = (
    ("kl", "KL from the reference, nats a token"),
    ("questions", "questions right, %"),
    ("json_valid", "JSON that satisfies its schema, %"),
    ("tool_calls", "tool calls right, %"),
)


def quality_figure(cells: Sequence[Mapping[str, Any]]) -> "Figure":
    """Plot quality over experts per token, one line for each variant; ``cells`` as in ``evaluate.json``."""
    figure, axes = new_figure(width=13, height=3.6, columns=len(QUALITY_PANELS))
    variants = dict.fromkeys(_variant(cell) for cell in cells)
    for panel, (name, label) in zip(axes, QUALITY_PANELS, strict=True):
        for place, variant in enumerate(variants):
            own = [cell for cell in cells if _variant(cell) == variant]
            points = [(cell["setup"]["experts_k"], *_value(cell, name)) for cell in own if _value(cell, name)]
            if not points:
                continue
            ks, values, lows, highs = zip(*sorted(points), strict=True)
            # Shifted sideways, so that the intervals do not overlap.
            beside = [k + 0.12 * (place - (len(variants) - 1) / 2) for k in ks]
            (line,) = panel.plot(beside, values, marker="o", markersize=3, linewidth=1.2, label=variant)
            panel.vlines(beside, lows, highs, color=line.get_color(), alpha=0.35, linewidth=1)
        if name == "kl":
            panel.set_yscale("log")
        panel.set_xlabel("experts a token")
        panel.set_title(label, fontsize=9)
    axes[0].legend(frameon=False)
    return figure


def _variant(cell: Mapping[str, Any]) -> str:
    setup = cell["setup"]
    return str(setup["backend"].get("variant") or f"{setup['experts']['bits'] or 'dense'}")


def _value(cell: Mapping[str, Any], name: str) -> tuple[float, float, float] | tuple[()]:
    """Return a value with its interval; empty if the cell lacks it."""
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
