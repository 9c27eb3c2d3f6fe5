"""Cases of products with resident matrices; see ``cases``."""

from collections.abc import Callable

import mlx.core as mx

from flashmoe_mlx.custom_kernels.case import Case, Results
from flashmoe_mlx.custom_kernels.normed_matvec import gpu as normed_gpu
from flashmoe_mlx.custom_kernels.normed_matvec import reference as normed_reference
from flashmoe_mlx.custom_kernels.quantized_matvec import cpu as matvec_cpu
from flashmoe_mlx.custom_kernels.quantized_matvec import gpu as matvec_gpu
from flashmoe_mlx.custom_kernels.quantized_matvec import mlx as matvec_mlx
from flashmoe_mlx.custom_kernels.quantized_matvec import reference as matvec_reference
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs


def quantized_matvec(
    rows: int,
    columns: int,
    dtype: mx.Dtype,
    *,
    bits: int = 4,
    group_size: int = 64,
    tokens: int = 1,
    seed: int = 0,
    scales: mx.Dtype | None = None,
    on_cpu: bool = False,
    with_residual: bool = False,
) -> Case:
    """Return a resident matrix times a few vectors.

    Args:
        rows: rows of the matrix.
        columns: columns of the matrix.
        dtype: type of activations.
        bits: width of a code.
        group_size: codes that share a scale and a bias.
        tokens: number of vectors.
        seed: seed of the random numbers.
        scales: type of scales and biases; None stands for ``dtype``.
        on_cpu: run the kernel of the C++ extension.
        with_residual: whether to add a residual; only on GPUs.
    """
    inputs = RandomInputs(dtype, seed, scales)
    weight = inputs.quantized(rows, columns, bits, group_size)
    assert weight.scales is not None
    assert weight.biases is not None
    parts = (weight.weight, weight.scales, weight.biases)
    x = inputs.normal(tokens, columns)
    added = [inputs.normal(tokens, rows)] if with_residual else []
    custom: Callable[..., mx.array] = matvec_cpu.quantized_matvec if on_cpu else matvec_gpu.quantized_matvec
    return Case(
        "quantized_matvec",
        f"{rows}x{columns} {bits} bit g{group_size} T={tokens}",
        dtype,
        sum(part.nbytes for part in parts),
        lambda: (custom(x, *parts, bits, group_size, *added),),
        lambda: (matvec_mlx.quantized_matvec(x, *parts, bits, group_size, *added),),
        lambda: (
            matvec_reference.quantized_matvec(
                x.astype(mx.float64), *parts, bits, group_size, *(array.astype(mx.float64) for array in added)
            ),
        ),
    )


def normed_matvec(
    rows: int, columns: int, dtype: mx.Dtype, *, bits: int = 4, group_size: int = 64, seed: int = 0
) -> Case:
    """Return a vector that is normalized and multiplied by a resident matrix.

    Args:
        rows: rows of the matrix.
        columns: columns of the matrix.
        dtype: type of activations.
        bits: width of a code.
        group_size: codes that share a scale and a bias.
        seed: seed of the random numbers.
    """
    inputs = RandomInputs(dtype, seed)
    weight = inputs.quantized(rows, columns, bits, group_size)
    x, norm = inputs.normal(1, columns, scale=3.0), inputs.normal(columns)

    def run(implementation: Callable[..., Results], wide: mx.Dtype) -> Results:
        return implementation(
            x.astype(wide), norm.astype(wide), 1e-3, weight.weight, weight.scales, weight.biases, bits, group_size
        )

    return Case(
        "normed_matvec",
        f"{rows}x{columns} {bits} bit g{group_size}",
        dtype,
        sum(part.nbytes for part in (weight.weight, weight.scales, weight.biases) if part is not None),
        lambda: run(normed_gpu.normed_matvec, dtype),
        lambda: run(normed_reference.by_mlx, dtype),
        lambda: run(normed_reference.normed_matvec, mx.float64),
    )
