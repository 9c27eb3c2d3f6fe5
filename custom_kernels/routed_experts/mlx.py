"""Routed experts by MLX's quantized products, expert by expert."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.expert_format import ExpertFormat
from flashmoe_mlx.custom_kernels.expert_mlp.mlx import expert_mlp
from flashmoe_mlx.custom_kernels.routed_experts import reference
from flashmoe_mlx.custom_kernels.weights import ExpertWeights


def routed_experts(
    x: mx.array,
    slab: mx.array,
    rows: mx.array,
    routing_weights: mx.array,
    form: ExpertFormat,
    shared: ExpertWeights | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """Compute ``reference.routed_experts``, each expert by MLX's quantized products."""
    return reference.routed_experts(x, slab, rows, routing_weights, form, shared, residual, expert_mlp)
