"""Statistics of a routing trace: how uneven the choices are, and how soon an expert is chosen again."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.formats.trace import RoutingTrace


def use_counts(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """Count the tokens that chose each expert, [layers, experts]."""
    _, layers, _ = trace.experts.shape
    return np.stack(
        [np.bincount(trace.experts[:, layer].ravel(), minlength=trace.num_experts) for layer in range(layers)]
    )


def coverage(trace: RoutingTrace) -> npt.NDArray[np.float64]:
    """Return the share of all choices that fall on the n most chosen experts of each layer, [experts + 1], from n = 0.

    This is the hit rate of pinning the best n experts. It is too optimistic for few tokens, since the experts are
    selected and judged with the same tokens.
    """
    most_first = -np.sort(-use_counts(trace), axis=1)
    summed = most_first.sum(axis=0).cumsum() / most_first.sum()
    return np.concatenate([[0.0], summed])


def effective_experts(trace: RoutingTrace) -> npt.NDArray[np.float64]:
    """Return the number of equally likely experts with the same entropy as the choices of each layer, [layers]."""
    shares = use_counts(trace) / use_counts(trace).sum(axis=1, keepdims=True)
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    return np.asarray(np.exp(-(shares * logs).sum(axis=1)))


def overlap(trace: RoutingTrace, distance: int = 1) -> npt.NDArray[np.float64]:
    """Return the share of a token's experts that the token ``distance`` earlier chose too, mean over tokens, [layers].

    NaN if the trace has no more than ``distance`` tokens.
    """
    tokens, layers, _ = trace.experts.shape
    if tokens <= distance:
        return np.full(layers, np.nan)
    now, before = trace.experts[distance:], trace.experts[:-distance]
    return np.asarray((now[..., :, None] == before[..., None, :]).any(-1).mean(axis=(0, 2)))


def reuse_distances(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """Return the tokens since each chosen expert's previous choice in its layer, [tokens, layers, K]; 0 for none."""
    tokens, layers, _ = trace.experts.shape
    last = np.full((layers, trace.num_experts), -1, np.int64)
    distances = np.zeros(trace.experts.shape, np.int64)
    rows = np.arange(layers)[:, None]
    for token in range(tokens):
        chosen = trace.experts[token]
        before = last[rows, chosen]
        distances[token] = np.where(before < 0, 0, token - before)
        last[rows, chosen] = token
    return distances


@dataclass(frozen=True)
class RoutingSummary:
    """A trace in a few numbers.

    Attributes:
        tokens: tokens, prompt included.
        layers: layers.
        experts_k: experts per token.
        num_experts: experts in each layer.
        top_share: share of choices that fall on the most used tenth of the experts.
        effective_experts: number of equally likely experts with the same entropy, mean over layers.
        overlap: mean overlap with the previous token; None for a single token.
        chance_overlap: expected overlap of random choices.
        reuse: median and 90 % quantile of the reuse distance in tokens, over repeated choices; None without any.
        first_time: share of choices whose expert had not been chosen before.
    """

    tokens: int
    layers: int
    experts_k: int
    num_experts: int
    top_share: float
    effective_experts: float
    overlap: float | None
    chance_overlap: float
    reuse: tuple[float, float] | None
    first_time: float


def summarize(trace: RoutingTrace) -> RoutingSummary:
    """Summarize ``trace``, prompt included."""
    tokens, layers, k = trace.experts.shape
    distances = reuse_distances(trace)
    again = distances[distances > 0]
    return RoutingSummary(
        tokens=tokens,
        layers=layers,
        experts_k=k,
        num_experts=trace.num_experts,
        top_share=float(coverage(trace)[max(1, round(trace.num_experts / 10))]),
        effective_experts=float(effective_experts(trace).mean()),
        overlap=float(overlap(trace).mean()) if tokens > 1 else None,
        chance_overlap=k / trace.num_experts,
        reuse=(float(np.percentile(again, 50)), float(np.percentile(again, 90))) if len(again) else None,
        first_time=float((distances == 0).mean()),
    )
