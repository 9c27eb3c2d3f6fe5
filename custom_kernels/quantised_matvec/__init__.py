"""A quantised matrix times a few vectors: decoding with resident weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from flashmoe_mlx.custom_kernels.expert_mlp.reference import Weight, format_name
from flashmoe_mlx.custom_kernels.kernel import Kernel, dialect
from flashmoe_mlx.custom_kernels.nvidia import COPY_ENGINE, Gpu, gpu
from flashmoe_mlx.custom_kernels.quantised_matvec import reference

__all__ = ["MOST_TOKENS", "Products", "by_mlx", "code_path", "one_by_one", "quantised_matvec", "reference"]

Products = Callable[[mx.array, Sequence[Weight], mx.array | None], tuple[mx.array, ...]]
"""Products of one ``x`` with several quantised matrices: of [T, columns], [T, rows] each. The last argument, [T, rows]
or None, is added to the product with the only matrix.
"""

MOST_TOKENS = 8
_CHUNK = 32
_ROWS = 4
_INPUTS = ["x", "weight", "scales", "biases"]
BODY = Kernel("quantised_matvec", "body", _INPUTS, ["y"], ["loads", "codes"])
TENSOR = Kernel("quantised_matvec", "tensor", _INPUTS, ["y"], ["mma", "tensor_codes"])
_STREAM_CHUNK = 512
_STREAM_SIMDGROUPS = 8
_SIMDGROUPS = 4
_DEPTH = 4
"""Steps whose weights are under way at once."""


def code_path(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> tuple[str, ...] | None:
    """Name the code path of ``quantised_matvec``; None if it is not made for the arguments.

    For one vector the plan depends on the sizes of the matrix.
    """
    if (
        len(x) > MOST_TOKENS
        or bits not in (2, 3, 4, 8)
        or group_size % _CHUNK
        or weight.shape[0] % _ROWS
        or x.dtype not in (mx.float32, mx.bfloat16)
        or scales.dtype != biases.dtype
    ):
        return None
    form = format_name(bits, group_size, scales.dtype)
    if len(x) == 1:
        return "one token", form, f"{weight.shape[0]} x {x.shape[1]}"
    tensor = "on tensor cores" if _on_tensor_cores(x, weight, scales, bits, group_size) else ""
    return f"2 to {MOST_TOKENS} tokens", form, tensor


def by_mlx(x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int) -> mx.array:
    """As ``reference.quantised_matvec``, by MLX, for any number of vectors."""
    return mx.quantized_matmul(x, weight, scales, biases, group_size=group_size, bits=bits)


def one_by_one(product: Callable[[mx.array, mx.array, mx.array, mx.array, int, int], mx.array]) -> Products:
    """``Products`` by a ``product`` with one matrix."""

    def products(x: mx.array, weights: Sequence[Weight], before: mx.array | None = None) -> tuple[mx.array, ...]:
        results = []
        for one in weights:
            assert one.scales is not None
            assert one.biases is not None
            assert one.bits is not None
            assert one.group_size is not None
            results.append(product(x, one.weight, one.scales, one.biases, one.bits, one.group_size))
        return tuple(results) if before is None else (before + results[0],)

    return products


def quantised_matvec(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> mx.array:
    """As ``reference.quantised_matvec``, in one dispatch, for arguments with a ``code_path``."""
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
    if dialect() == "cuda" and tokens == 1 and x.dtype == scales.dtype == mx.bfloat16:
        plan = stream_plan(outputs, columns, bits, group_size, gpu())
        if plan is not None:
            kernel, groups = stream_kernel(plan.shared_memory), (plan.threadgroups, 1, 1)
            (y,) = kernel(inputs, result, groups, 32 * _STREAM_SIMDGROUPS, {**template, **plan.template})
            return y
    if _on_tensor_cores(x, weight, scales, bits, group_size):
        groups = (outputs // 16, tokens, 1)
        (y,) = TENSOR(inputs, result, groups, 32 * _SIMDGROUPS, template | {"SIMDGROUPS": _SIMDGROUPS, "DEPTH": _DEPTH})
        return y
    threads = min(256, -(-columns // (32 * _CHUNK)) * 32)
    own: dict[str, int | mx.Dtype] = {"S": scales.dtype, "TOKENS": tokens, "ROWS": _ROWS, "THREADS": threads}
    (y,) = BODY(inputs, result, (outputs // _ROWS, 1, 1), threads, template | own)
    return y


@cache
def stream_kernel(shared_memory: int) -> Kernel:
    """For one vector on tensor cores, ``shared_memory`` in bytes."""
    return Kernel(
        "quantised_matvec",
        "stream",
        _INPUTS,
        ["y"],
        ["mma", "copy_engine", "tensor_stream"],
        shared_memory=shared_memory,
    )


@dataclass(frozen=True)
class StreamPlan:
    """How ``stream_kernel`` divides its work; ``shared_memory`` in bytes."""

    template: Mapping[str, int]
    threadgroups: int
    shared_memory: int


def stream_plan(outputs: int, columns: int, bits: int, group_size: int, device: Gpu) -> StreamPlan | None:
    """The plan for one vector in bf16 on tensor cores: a threadgroup a multiprocessor, weights under way as fit.

    None for 3 bits, small groups, rows that are not whole sixteens, columns that are no whole chunks, or a GPU without
    the copy engine or the memory.
    """
    if (
        device.capability < COPY_ENGINE
        or bits not in (2, 4, 8)
        or group_size not in (64, 128)
        or outputs % 16
        or columns % max(_STREAM_CHUNK, 8 * group_size)  # scales are copied 16 bytes at a time
    ):
        return None
    chunks = columns // _STREAM_CHUNK
    batch = max(1, _STREAM_SIMDGROUPS // chunks)
    steps = -(-outputs // (16 * batch))
    threadgroups = min(device.multiprocessors, steps)
    slot = int(16 * batch * columns * (bits + 2 * 16 / group_size) / 8)
    others = columns * (2 * group_size + 8) // group_size + 2 * 4 * 16 * batch * chunks
    slots = min(-(-steps // threadgroups), (device.shared_memory - others) // (slot + 8))
    if slots < 1:
        return None
    template = {"SIMDGROUPS": _STREAM_SIMDGROUPS, "BATCH": batch, "SLOTS": slots}
    return StreamPlan(template, threadgroups, slots * (slot + 8) + others)


def _on_tensor_cores(x: mx.array, weight: mx.array, scales: mx.array, bits: int, group_size: int) -> bool:
    return (
        dialect() == "cuda"
        and bits in (2, 4)
        and group_size in (64, 128)
        and x.dtype == scales.dtype == mx.bfloat16
        and x.shape[1] % 256 == 0
        and weight.shape[0] % 16 == 0
    )
