"""Routing traces drawn at random, for benchmarks and predictions without a recorded trace."""

import math

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.trace import MAX_CHOICES, MAX_EXPERTS, RoutingTrace

__all__ = ["uniform_trace", "zipf_trace"]

_BLOCK = 2**20
"""Random numbers drawn at once, which take 8 MB."""


def uniform_trace(tokens: int, layers: int, num_experts: int, k: int, seed: int) -> RoutingTrace:
    """Draw a trace without a prompt in which every choice of ``k`` among ``num_experts`` is equally likely.

    Args:
        tokens: number of tokens.
        layers: number of layers.
        num_experts: experts in each layer.
        k: experts of a token in a layer.
        seed: seed of the random numbers.

    Raises:
        InputError: a size is less than 1 or ``k`` more than ``num_experts`` (code "out_of_range"), or the trace
            is too large for a file ("trace_too_large").
    """
    return _draw(f"uniform seed={seed}", (tokens, layers, k), num_experts, 0.0, seed)


def zipf_trace(tokens: int, layers: int, num_experts: int, k: int, exponent: float, seed: int) -> RoutingTrace:
    """Draw a trace without a prompt in which experts are chosen by Zipf's law, without replacement.

    In each layer the experts get random ranks from 1 and weights ``rank ** -exponent``. A longer trace with the same
    seed begins with the same tokens.

    Args:
        tokens: number of tokens.
        layers: number of layers.
        num_experts: experts in each layer.
        k: experts of a token in a layer.
        exponent: exponent of the weights; 0 makes all experts equally likely.
        seed: seed of the random numbers.

    Raises:
        InputError: as for ``uniform_trace``, or ``exponent`` is negative or not finite (code "out_of_range").
    """
    if not (math.isfinite(exponent) and exponent >= 0):
        raise InputError(f"a Zipf exponent of {exponent} gives no trace; it must be at least 0", code="out_of_range")
    return _draw(f"zipf exponent={exponent} seed={seed}", (tokens, layers, k), num_experts, exponent, seed)


def _draw(name: str, shape: tuple[int, int, int], num_experts: int, exponent: float, seed: int) -> RoutingTrace:
    tokens, layers, k = shape
    if min(shape) < 1 or not k <= num_experts <= MAX_EXPERTS or seed < 0:
        raise InputError(
            f"{tokens} tokens, {layers} layers, {k} of {num_experts} experts, seed {seed} give no trace; sizes must be "
            f"at least 1, experts at most {MAX_EXPERTS}, the seed at least 0",
            code="out_of_range",
        )
    if math.prod(shape) > MAX_CHOICES or layers * num_experts > _BLOCK:
        raise InputError(
            f"{name}: {tokens} tokens of {layers} layers with {num_experts} experts are too many",
            code="trace_too_large",
        )
    random = np.random.default_rng(seed)
    ranks = np.stack([random.permutation(num_experts) for _ in range(layers)]) + 1
    log_weights = -exponent * np.log(ranks)
    experts = np.empty(shape, np.uint16)
    step = _BLOCK // log_weights.size
    for start in range(0, tokens, step):
        block = experts[start : start + step]
        block[:] = _weighted_choices(log_weights, len(block), k, random)
    return RoutingTrace(experts, num_experts, 0, name, "")


def _weighted_choices(
    log_weights: npt.NDArray[np.float64], tokens: int, k: int, random: np.random.Generator
) -> npt.NDArray[np.intp]:
    """Draw [tokens, layers, k] without replacement by the weights [layers, experts], in the order of drawing.

    The k largest sums of log weight and Gumbel noise, largest first, have exactly this distribution: Kool et al.,
    "Stochastic beams and where to find them", ICML 2019.
    """
    scores = log_weights + random.gumbel(size=(tokens, *log_weights.shape))
    largest = np.argpartition(-scores, k - 1, axis=-1)[..., :k]
    order = np.argsort(-np.take_along_axis(scores, largest, axis=-1), axis=-1)
    return np.take_along_axis(largest, order, axis=-1)
