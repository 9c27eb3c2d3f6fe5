"""The SwiGLU MLP of one routed expert, on its record in place."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.expert_mlp import reference
from flashmoe_mlx.custom_kernels.expert_mlp.reference import ExpertWeights, Weight

__all__ = ["ExpertWeights", "Weight", "expert_mlp", "reference"]


def expert_mlp(x: mx.array, expert: ExpertWeights) -> mx.array:
    """As ``reference.expert_mlp``, without dequantising."""
    gate, up = _apply(x, expert.gate), _apply(x, expert.up)
    return _apply(gate * mx.sigmoid(gate) * up, expert.down)


def _apply(x: mx.array, weight: Weight) -> mx.array:
    if weight.bits is None:
        return x @ weight.weight.astype(x.dtype).T
    assert weight.scales is not None
    assert weight.biases is not None
    # Mixed types would make MLX promote x as well; the scales of one expert are small.
    return mx.quantized_matmul(
        x,
        weight.weight,
        weight.scales.astype(x.dtype),
        weight.biases.astype(x.dtype),
        group_size=weight.group_size,
        bits=weight.bits,
    )
