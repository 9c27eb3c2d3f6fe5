"""The MLP of an expert by MLX's quantized products."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.quantized_matvec.mlx import quantized_matvec
from flashmoe_mlx.custom_kernels.weights import ExpertWeights, QuantizedWeight


def expert_mlp(x: mx.array, expert: ExpertWeights) -> mx.array:
    """Compute ``reference.expert_mlp`` without dequantizing."""
    gate, up = _product(x, expert.gate), _product(x, expert.up)
    return _product(gate * mx.sigmoid(gate) * up, expert.down)


def _product(x: mx.array, weight: QuantizedWeight) -> mx.array:
    if weight.bits is None:
        return x @ weight.weight.astype(x.dtype).T
    assert weight.scales is not None
    if weight.biases is None:
        sizes = weight.group_size, weight.bits
        return mx.quantized_matmul(x, weight.weight, weight.scales, None, True, *sizes, weight.mode)
    assert weight.group_size is not None
    # MLX would promote x to a wider type of the scales; the scales of one expert are cheaper to convert.
    scales, biases = weight.scales.astype(x.dtype), weight.biases.astype(x.dtype)
    return quantized_matvec(x, weight.weight, scales, biases, weight.bits, weight.group_size)
