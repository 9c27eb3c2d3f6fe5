"""A quantized matrix times a few vectors by MLX."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.kernel import dialect

_MOST_ROWS_COMPILED = 8
"""With more vectors, MLX on CUDA compiles its product for every number of rows and shape, which takes seconds each."""


def quantized_matvec(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    bits: int,
    group_size: int,
    residual: mx.array | None = None,
) -> mx.array:
    """Compute ``reference.quantized_matvec`` for any number of vectors."""
    if len(x) > _MOST_ROWS_COMPILED and dialect() == "cuda":
        dense = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits)
        y = x @ dense.astype(x.dtype).T
    else:
        y = mx.quantized_matmul(x, weight, scales, biases, group_size=group_size, bits=bits)
    return y if residual is None else residual + y
