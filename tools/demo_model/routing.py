"""Measure the routing of the demo model: skew of the choices, in one document and overall, and reuse of experts.

python tools/demo_model/routing.py [PNG]        # needs flashmoe_mlx; the figure needs its extra `research`
"""

import sys
from pathlib import Path

import numpy as np

from flashmoe_mlx import load
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.made_models.demo import demo_folder
from flashmoe_mlx.research.figures import new_figure, save
from flashmoe_mlx.research.quality.items import load_items, shipped_items
from flashmoe_mlx.research.quality.passages import passage
from flashmoe_mlx.research.traces.recorder import recorded
from flashmoe_mlx.research.traces.routing import overlap, use_counts

_ITEMS = 12
"""Number of documents of each kind."""
_WINDOWS = (1, 4, 16, 64)


def traces() -> dict[str, list[RoutingTrace]]:
    """Return the routing of the held-out documents, prompts and answers, by kind."""
    found: dict[str, list[RoutingTrace]] = {}
    with load(demo_folder(), "resident") as engine:
        for item in load_items(shipped_items(), limit=_ITEMS):
            tokens = passage(engine, item)
            with recorded(engine) as recorder:
                engine.logits([*tokens.given, *tokens.scored])
            found.setdefault(item.kind, []).append(recorder.trace(engine.model.config.num_experts, tokens.given))
    return found


def main() -> None:
    """Print the statistics and draw the figure."""
    by_kind = traces()
    every = [trace for traces in by_kind.values() for trace in traces]
    counts = np.sum([use_counts(trace) for trace in every], axis=0)
    shares = counts / counts.sum(axis=1, keepdims=True)
    experts = shares.shape[1]
    print(f"{counts[0].sum() // every[0].experts.shape[2]} tokens of {len(every)} documents")
    print("layer  effective experts  least  most (of uniform)  busiest tenth")
    for layer, row in enumerate(shares):
        entropy = float(np.exp(-(row * np.log(np.maximum(row, 1e-12))).sum()))
        busiest = np.sort(row)[::-1][: round(experts / 10)].sum()
        print(f"{layer:5} {entropy:18.1f} {row.min() * experts:6.2f} {row.max() * experts:5.2f} {busiest:24.1%}")
    print("kind          tokens  effective experts, one document  overlap with the previous token (chance)")
    for kind, own in by_kind.items():
        tokens = sum(len(trace.experts) for trace in own)
        effective = np.mean([_effective(trace) for trace in own])
        kept = np.mean([overlap(trace).mean() for trace in own if len(trace.experts) > 1])
        print(f"{kind:12} {tokens:7} {effective:31.1f} {kept:32.1%} ({every[0].experts.shape[2] / experts:.1%})")
    print("working set: distinct experts of a layer in a number of consecutive tokens")
    for window in _WINDOWS:
        starts = ((trace, start) for trace in every for start in range(0, len(trace.experts) - window + 1, 16))
        sizes = [_distinct(trace, start, window) for trace, start in starts]
        print(f"{window:4} tokens: {np.mean(sizes):5.1f} of {experts} (independent choices: {_expected(window):5.1f})")
    if len(sys.argv) > 1:
        figure, (left, right) = new_figure(width=10, columns=2)
        for layer, row in enumerate(shares):
            left.plot(np.sort(row)[::-1] * experts, linewidth=1, label=f"layer {layer}")
        left.axhline(1, color="black", linewidth=0.8, linestyle=":")
        left.set(xlabel="experts, busiest first", ylabel="use, of uniform", title="over all documents")
        left.legend(frameon=False, fontsize=7)
        for kind, own in by_kind.items():
            summed = np.sum([use_counts(trace) for trace in own], axis=0)
            ranked = -np.sort(-summed, axis=1).mean(axis=0)
            right.plot(ranked / ranked.sum() * experts, linewidth=1, label=kind)
        right.axhline(1, color="black", linewidth=0.8, linestyle=":")
        right.set(xlabel="experts, busiest first", title="by kind of document, mean of layers")
        right.legend(frameon=False, fontsize=7)
        save(figure, Path(sys.argv[1]))


def _effective(trace: RoutingTrace) -> float:
    counts = use_counts(trace)
    shares = counts / counts.sum(axis=1, keepdims=True)
    return float(np.exp(-(shares * np.log(np.maximum(shares, 1e-12))).sum(axis=1)).mean())


def _distinct(trace: RoutingTrace, start: int, window: int) -> float:
    chosen = trace.experts[start : start + window]
    return float(np.mean([len(np.unique(chosen[:, layer])) for layer in range(chosen.shape[1])]))


def _expected(window: int, experts: int = 64, k: int = 10) -> float:
    return experts * (1 - (1 - k / experts) ** window)


if __name__ == "__main__":
    main()
