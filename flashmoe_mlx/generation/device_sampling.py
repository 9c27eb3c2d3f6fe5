"""Draw a token on the device that computed its logits."""

import math
from collections import defaultdict
from collections.abc import Mapping
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


def choose_each(logits: mx.array, choices: Mapping[int, tuple[Filters, float | None]]) -> mx.array:
    """Choose a token for every row of ``logits`` f32 [R, vocabulary] lazily, uint32 [R].

    Args:
        logits: the logits of the rows.
        choices: the options of rows and their random numbers, None for greedy decoding; other rows are greedy.
    """
    alike: dict[tuple[int, float, float], list[int]] = defaultdict(list)
    for row, (options, number) in choices.items():
        if number is not None:
            alike[options.top_k, options.top_p, options.min_p].append(row)
    tokens = mx.argmax(logits, axis=-1)
    for rows in alike.values():
        own, at = [choices[row] for row in rows], mx.array(rows, mx.uint32)
        temperatures, numbers = [one.temperature for one, _ in own], [number or 0.0 for _, number in own]
        tokens[at] = draw(logits[at], own[0][0], temperatures, numbers)
    return tokens


def draw(logits: mx.array, filters: Filters, temperatures: list[float], numbers: list[float]) -> mx.array:
    """Draw a token of each row lazily, uint32 [T], in the order and with the filters of ``Sampler``.

    Args:
        logits: f32 [T, vocabulary], with at least one finite value in each row.
        filters: the filters of all rows.
        temperatures: the temperature of each row.
        numbers: for each row, a random number from 0 to 1, excluding 1.
    """
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / mx.array(temperatures, mx.float32)[:, None]
    tokens: mx.array | None = None
    if 0 < filters.top_k < logits.shape[1]:
        tokens = mx.sort(mx.argpartition(-scaled, filters.top_k - 1, axis=-1)[:, : filters.top_k], axis=-1)
        scaled = mx.take_along_axis(scaled, tokens, axis=-1)
    if filters.top_k > 0 or filters.top_p < 1:
        order = mx.argsort(-scaled, axis=-1)
        tokens = order if tokens is None else mx.take_along_axis(tokens, order, axis=-1)
        scaled = mx.take_along_axis(scaled, order, axis=-1)
    weights = mx.exp(scaled)
    if filters.top_p < 1:
        before = mx.cumsum(weights / weights.sum(axis=-1, keepdims=True), axis=-1, inclusive=False)
        weights = mx.where(before < filters.top_p, weights, 0)
    if filters.min_p > 0:
        weights = mx.where(scaled >= math.log(filters.min_p), weights, 0)
    cumulative = mx.cumsum(weights, axis=-1)
    # A product with the largest number below 1 is below the sum, so a token of weight 0 is never drawn.
    shares = mx.array([min(number, _BELOW_ONE) for number in numbers], mx.float32)[:, None]
    place = (cumulative <= shares * cumulative[:, -1:]).sum(axis=-1, keepdims=True).astype(mx.uint32)
    drawn = place if tokens is None else mx.take_along_axis(tokens, place, axis=-1)
    return drawn.squeeze(-1).astype(mx.uint32)
