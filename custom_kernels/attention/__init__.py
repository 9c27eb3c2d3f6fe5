"""Causal attention over the cache."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.attention import reference

__all__ = ["attention", "reference"]


def attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """As ``reference.attention``, by MLX's fused operation."""
    scale = queries.shape[-1] ** -0.5
    # A single query sees every key, and MLX is faster without a mask.
    mask = "causal" if queries.shape[2] > 1 else None
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
