"""A quantized matrix times a few vectors by MLX."""

import mlx.core as mx


def quantized_matvec(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> mx.array:
    """Compute ``reference.quantized_matvec`` for any number of vectors."""
    return mx.quantized_matmul(x, weight, scales, biases, group_size=group_size, bits=bits)
