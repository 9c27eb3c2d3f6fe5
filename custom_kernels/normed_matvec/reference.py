"""RMS norm, then a quantized matrix, in elementary operations."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from flashmoe_mlx.custom_kernels.precision import widen
from flashmoe_mlx.custom_kernels.quantized_matvec import mlx, reference


def normed_matvec(
    x: mx.array,
    norm: mx.array,
    eps: float,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    bits: int,
    group_size: int,
    product: Callable[..., mx.array] = reference.quantized_matvec,
) -> tuple[mx.array, mx.array]:
    """Normalize vectors, and multiply them by a matrix W [out, in] in MLX's affine format.

    Args:
        x: [T, in].
        norm: factors of the norm, [in].
        eps: epsilon of the norm.
        weight: uint32 [out, in * bits / 32].
        scales: [out, in / group_size].
        biases: [out, in / group_size].
        bits: width of a code.
        group_size: codes that share a scale and a bias.
        product: an implementation of ``quantized_matvec``.

    Returns:
        The products [T, out], and the normalized vectors [T, in], both in the type of ``x``.
    """
    normed = mx.fast.rms_norm(widen(x), widen(norm), eps)
    return product(normed, weight, scales, biases, bits, group_size).astype(x.dtype), normed.astype(x.dtype)


def by_mlx(x: mx.array, norm: mx.array, eps: float, *matrix: Any) -> tuple[mx.array, mx.array]:
    """Compute ``normed_matvec`` by MLX's norm and product."""
    normed = mx.fast.rms_norm(x, norm, eps)
    return mlx.quantized_matvec(normed, *matrix), normed
