"""A quantised matrix times a few vectors, dequantised first."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.precision import wide


def quantised_matvec(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> mx.array:
    """X W^T, for W [out, in] in MLX's affine format.

    Args:
        x: [T, in].
        weight: uint32 [out, in * bits / 32].
        scales: [out, in / group_size].
        biases: the same.
        bits: width of a code.
        group_size: codes that share a scale and a bias.

    Returns:
        [T, out] in the type of ``x``; computed in f32.
    """
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    dense = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits)
    return (wide(x) @ dense.T.astype(wide(x).dtype)).astype(x.dtype)
