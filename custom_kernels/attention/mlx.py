"""Attention by MLX's fused operations."""

from functools import cache

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.attention import reference
from flashmoe_mlx.custom_kernels.attention.reference import AttentionInputs, Results
from flashmoe_mlx.custom_kernels.weights import AttentionWeights

_SCORES = 2**26
"""Maximum number of attention scores held at once; longer prompts are divided into blocks of queries."""


def gated_attention(inputs: AttentionInputs) -> Results:
    """Compute ``reference.gated_attention`` by MLX's fused operations."""
    return reference.gated_attention(inputs, attention, rotate)


def attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Compute ``reference.attention`` by MLX's fused operation, in blocks of queries."""
    length, span = queries.shape[2], keys.shape[2]
    step = max(1, _SCORES // (queries.shape[1] * span))
    blocks = []
    for begin in range(0, length, step):
        end = min(begin + step, length)
        visible = span - length + end
        block = queries[:, :, begin:end]
        # A single query sees every key, and MLX is faster without a mask.
        mask = "causal" if block.shape[2] > 1 else None
        scale = queries.shape[-1] ** -0.5
        blocks.append(
            mx.fast.scaled_dot_product_attention(
                block, keys[:, :, :visible], values[:, :, :visible], scale=scale, mask=mask
            )
        )
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def rotate(x: mx.array, weights: AttentionWeights, start: int) -> mx.array:
    """Compute ``reference.rotate`` by MLX's fused operation."""
    periods = None if weights.frequencies is None else _periods(weights.frequencies)
    base = weights.theta if periods is None else None
    return mx.fast.rope(x, weights.rotary_dim, traditional=False, base=base, scale=1.0, offset=start, freqs=periods)


@cache
def _periods(frequencies: tuple[float, ...]) -> mx.array:
    """Return the positions per radian of each pair, which MLX calls frequencies."""
    return mx.array(1.0 / np.array(frequencies), mx.float32)
