"""Draw a token on the device that computed its logits."""

import math
from typing import Protocol

import mlx.core as mx

_BELOW_ONE = 1 - 2.0**-24
"""The largest number below 1 in f32."""


class Filters(Protocol):
    """The options of ``SamplingOptions`` that ``draw`` applies."""

    @property
    def temperature(self) -> float:
        """Above 0."""
        ...

    @property
    def top_k(self) -> int:
        """The number of most probable tokens to keep; 0 for all."""
        ...

    @property
    def top_p(self) -> float:
        """The probability that the kept tokens must reach together."""
        ...

    @property
    def min_p(self) -> float:
        """The least probability of a token, relative to the most probable token."""
        ...


def draw(logits: mx.array, options: Filters, number: float) -> mx.array:
    """Draw a token lazily, uint32 [1], in the order and with the filters of ``Sampler``.

    Args:
        logits: f32 [vocabulary], with at least one finite value.
        options: the temperature and the filters.
        number: a random number from 0 to 1, excluding 1.
    """
    scaled = (logits - logits.max()) / options.temperature
    tokens: mx.array | None = None
    if 0 < options.top_k < len(logits):
        tokens = mx.sort(mx.argpartition(-scaled, options.top_k - 1)[: options.top_k])
        scaled = scaled[tokens]
    if options.top_k > 0 or options.top_p < 1:
        order = mx.argsort(-scaled)
        tokens = order if tokens is None else tokens[order]
        scaled = scaled[order]
    weights = mx.exp(scaled)
    if options.top_p < 1:
        before = mx.cumsum(weights / weights.sum(), inclusive=False)
        weights = mx.where(before < options.top_p, weights, 0)
    if options.min_p > 0:
        weights = mx.where(scaled >= math.log(options.min_p), weights, 0)
    cumulative = mx.cumsum(weights)
    # A product with the largest number below 1 is below the sum, so a token of weight 0 is never drawn.
    place = (cumulative <= min(number, _BELOW_ONE) * cumulative[-1:]).sum(keepdims=True).astype(mx.uint32)
    return place if tokens is None else tokens[place].astype(mx.uint32)
