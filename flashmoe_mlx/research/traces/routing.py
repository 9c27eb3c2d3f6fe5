"""Statistics of a routing trace: the skew of the choices, and the distance to an expert's next use."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.formats.trace import RoutingTrace

__all__ = ["RoutingSummary", "coverage", "effective_experts", "overlap", "reuse_distances", "summarize", "use_counts"]


def use_counts(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """Return the number of tokens that chose each expert, [layers, experts]."""
    _, layers, _ = trace.experts.shape
    return np.stack(
        [np.bincount(trace.experts[:, layer].ravel(), minlength=trace.num_experts) for layer in range(layers)]
    )


def coverage(trace: RoutingTrace) -> npt.NDArray[np.float64]:
    """Return the share of all choices that fall on the n most used experts of each layer, for n = 0 to all experts.

    This is the hit rate of pinning these experts. It is too optimistic for few tokens, since the same tokens select and
    test the experts.
    """
    counts = -np.sort(-use_counts(trace), axis=1)  # descending
    cumulative = counts.sum(axis=0).cumsum() / counts.sum()
    return np.concatenate([[0.0], cumulative])


def effective_experts(trace: RoutingTrace) -> npt.NDArray[np.float64]:
    """Return exp(entropy of the choices) of each layer, [layers]: the equivalent number of equally used experts."""
    shares = use_counts(trace) / use_counts(trace).sum(axis=1, keepdims=True)
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    return np.asarray(np.exp(-(shares * logs).sum(axis=1)))


def overlap(trace: RoutingTrace, distance: int = 1) -> npt.NDArray[np.float64]:
    """Return the mean share of a token's experts that the token ``distance`` earlier chose as well, [layers].

    NaN if the trace has no more than ``distance`` tokens.
    """
    tokens, layers, _ = trace.experts.shape
    if tokens <= distance:
        return np.full(layers, np.nan)
    current, earlier = trace.experts[distance:], trace.experts[:-distance]
    return np.asarray((current[..., :, None] == earlier[..., None, :]).any(-1).mean(axis=(0, 2)))


def reuse_distances(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """Return the number of tokens since each chosen expert was last chosen in its layer, [tokens, layers, K].

    The first choice of an expert has distance 0.
    """
    tokens, layers, _ = trace.experts.shape
    last = np.full((layers, trace.num_experts), -1, np.int64)
    distances = np.zeros(trace.experts.shape, np.int64)
    rows = np.arange(layers)[:, None]
    for token in range(tokens):
        chosen = trace.experts[token]
        previous = last[rows, chosen]
        distances[token] = np.where(previous < 0, 0, token - previous)
        last[rows, chosen] = token
    return distances


@dataclass(frozen=True)
class RoutingSummary:
    """The statistics of a trace in a few numbers.

    Attributes:
        tokens: number of tokens, prompt included.
        layers: number of layers.
        experts_k: experts per token.
        num_experts: experts per layer.
        top_share: share of choices that fall on the most used tenth of the experts.
        effective_experts: exp(entropy of the choices), mean over layers.
        overlap: mean overlap with the previous token; None for a single token.
        chance_overlap: expected overlap of uniformly random choices.
        reuse: median and 90th percentile of the reuse distance in tokens; None without repeated choices.
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
    """Return the statistics of ``trace``, prompt included."""
    tokens, layers, k = trace.experts.shape
    distances = reuse_distances(trace)
    reused = distances[distances > 0]
    return RoutingSummary(
        tokens=tokens,
        layers=layers,
        experts_k=k,
        num_experts=trace.num_experts,
        top_share=float(coverage(trace)[max(1, round(trace.num_experts / 10))]),
        effective_experts=float(effective_experts(trace).mean()),
        overlap=float(overlap(trace).mean()) if tokens > 1 else None,
        chance_overlap=k / trace.num_experts,
        reuse=(float(np.percentile(reused, 50)), float(np.percentile(reused, 90))) if len(reused) else None,
        first_time=float((distances == 0).mean()),
    )
