"""A quantised matrix times a few vectors: decoding with resident weights."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.kernel import Kernel, dialect
from flashmoe_mlx.custom_kernels.quantised_matvec import reference

__all__ = ["MOST_TOKENS", "by_mlx", "quantised_matvec", "reference", "takes"]

MOST_TOKENS = 8
_CHUNK = 32
_ROWS = 4
_INPUTS = ["x", "weight", "scales", "biases"]
BODY = Kernel("quantised_matvec", "body", _INPUTS, ["y"], ["loads", "codes"])
TENSOR = Kernel("quantised_matvec", "tensor", _INPUTS, ["y"], ["tensor_codes"])
_SIMDGROUPS = 4
_DEPTH = 4
"""Steps whose weights are under way at once."""


def takes(x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int) -> bool:
    """Whether ``quantised_matvec`` is made for these arguments."""
    return (
        len(x) <= MOST_TOKENS
        and bits in (2, 3, 4, 8)
        and group_size % _CHUNK == 0
        and weight.shape[0] % _ROWS == 0
        and x.dtype in (mx.float32, mx.bfloat16)
        and scales.dtype == biases.dtype
    )


def by_mlx(x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int) -> mx.array:
    """As ``reference.quantised_matvec``, by MLX, for any number of vectors."""
    return mx.quantized_matmul(x, weight, scales, biases, group_size=group_size, bits=bits)


def quantised_matvec(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> mx.array:
    """As ``reference.quantised_matvec``, in one dispatch, for what it ``takes``."""
    tokens, columns = x.shape
    outputs = weight.shape[0]
    template: dict[str, int | mx.Dtype] = {
        "T": x.dtype,
        "COLUMNS": columns,
        "OUTPUTS": outputs,
        "BITS": bits,
        "GROUP": group_size,
    }
    inputs, result = [x, weight, scales, biases], [((tokens, outputs), x.dtype)]
    if _on_tensor_cores(x, weight, scales, bits, group_size):
        groups = (outputs // 16, tokens, 1)
        (y,) = TENSOR(inputs, result, groups, 32 * _SIMDGROUPS, template | {"SIMDGROUPS": _SIMDGROUPS, "DEPTH": _DEPTH})
        return y
    threads = min(256, -(-columns // (32 * _CHUNK)) * 32)
    own: dict[str, int | mx.Dtype] = {"S": scales.dtype, "TOKENS": tokens, "ROWS": _ROWS, "THREADS": threads}
    (y,) = BODY(inputs, result, (outputs // _ROWS, 1, 1), threads, template | own)
    return y


def _on_tensor_cores(x: mx.array, weight: mx.array, scales: mx.array, bits: int, group_size: int) -> bool:
    return (
        dialect() == "cuda"
        and bits in (2, 4)
        and group_size in (64, 128)
        and x.dtype == scales.dtype == mx.bfloat16
        and x.shape[1] % 256 == 0
        and weight.shape[0] % 16 == 0
    )
