"""A quantized matrix times a few vectors, dequantized first."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.precision import widen


def quantized_matvec(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    bits: int,
    group_size: int,
    residual: mx.array | None = None,
) -> mx.array:
    """Compute X W^T + residual for W [out, in] in MLX's affine format.

    Args:
        x: [T, in].
        weight: uint32 [out, in * bits / 32].
        scales: [out, in / group_size].
        biases: [out, in / group_size].
        bits: width of a code.
        group_size: codes that share a scale and a bias.
        residual: [T, out], or None.

    Returns:
        [T, out] in the type of ``x``, computed in f32.
    """
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    dense = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits)
    y = widen(x) @ dense.T.astype(widen(x).dtype)
    return (y if residual is None else widen(residual) + y).astype(x.dtype)
