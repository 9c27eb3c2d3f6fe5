"""The SwiGLU MLP of one expert in elementary operations."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.precision import widen
from flashmoe_mlx.custom_kernels.weights import ExpertWeights


def expert_mlp(x: mx.array, expert: ExpertWeights) -> mx.array:
    """Compute down(silu(gate x) * up x) for ``x`` [T, hidden], in f32; return it in the type of ``x``."""
    x_wide = widen(x)
    gate, up = x_wide @ expert.gate.dense().T, x_wide @ expert.up.dense().T
    return ((gate * mx.sigmoid(gate) * up) @ expert.down.dense().T).astype(x.dtype)
