"""The kernels of quantized matrices times a few vectors for GPUs, in one dispatch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from flashmoe_mlx.custom_kernels.checks import CodePath, Sample, tokens_phrase
from flashmoe_mlx.custom_kernels.kernel import Kernel, dialect
from flashmoe_mlx.custom_kernels.nvidia import COPY_ENGINE, Gpu, gpu
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.custom_kernels.weights import QuantizedWeight, format_name

MOST_TOKENS = 8
_CHUNK = 32
_ROWS = 4
_INPUTS = ["x", "weight", "scales", "biases"]
BODY = Kernel(__package__, "body", _INPUTS, ["y"], ["loads", "codes"])
TENSOR = Kernel(__package__, "tensor", _INPUTS, ["y"], ["mma", "tensor_codes"])
_STREAM_CHUNK = 512
_STREAM_SIMDGROUPS = 8
_SIMDGROUPS = 4
_DEPTH = 4
"""Steps whose weights are in flight at once."""
_DRAWN_ROWS = 4099
"""Rows of a sample that are drawn; a larger matrix repeats them. Not a multiple of any block of the kernels."""
_COMPARED_ROWS = 128
"""Rows at either end of a sample's matrix whose products are compared."""


def code_path(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> CodePath | None:
    """Return the code path of ``quantized_matvec``; None if it does not support the arguments.

    For one vector the plan depends on the size of the matrix.
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
        return tokens_phrase(1), form, f"{weight.shape[0]} x {x.shape[1]}"
    tensor = "on tensor cores" if _on_tensor_cores(x, weight, scales, bits, group_size) else ""
    return f"2 to {MOST_TOKENS} tokens", form, tensor


def quantized_matvec(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> mx.array:
    """Compute ``reference.quantized_matvec`` for arguments with a ``code_path``."""
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
    """Return the kernel for one vector on tensor cores with ``shared_memory`` bytes."""
    return Kernel(
        __package__,
        "stream",
        _INPUTS,
        ["y"],
        ["mma", "copy_engine", "tensor_stream"],
        shared_memory=shared_memory,
    )


@dataclass(frozen=True)
class StreamPlan:
    """The division of work of ``stream_kernel``.

    Attributes:
        template: values of template arguments.
        threadgroups: number of threadgroups.
        shared_memory: shared memory of a threadgroup, in bytes.
    """

    template: Mapping[str, int]
    threadgroups: int
    shared_memory: int


def stream_plan(outputs: int, columns: int, bits: int, group_size: int, device: Gpu) -> StreamPlan | None:
    """Plan one vector in bf16 on tensor cores: a threadgroup per multiprocessor, as many weights in flight as fit.

    Args:
        outputs: rows of the matrix.
        columns: columns of the matrix.
        bits: width of a code.
        group_size: codes that share a scale and a bias.
        device: the GPU.

    Returns:
        None for 3 bits, small groups, rows that are not a multiple of 16, columns that are not a multiple of a chunk,
        and for a GPU without the copy engine or enough memory.
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
    rest = columns * (2 * group_size + 8) // group_size + 2 * 4 * 16 * batch * chunks
    slots = min(-(-steps // threadgroups), (device.shared_memory - rest) // (slot + 8))
    if slots < 1:
        return None
    template = {"SIMDGROUPS": _STREAM_SIMDGROUPS, "BATCH": batch, "SLOTS": slots}
    return StreamPlan(template, threadgroups, slots * (slot + 8) + rest)


def _on_tensor_cores(x: mx.array, weight: mx.array, scales: mx.array, bits: int, group_size: int) -> bool:
    return (
        dialect() == "cuda"
        and bits in (2, 4)
        and group_size in (64, 128)
        and x.dtype == scales.dtype == mx.bfloat16
        and x.shape[1] % 256 == 0
        and weight.shape[0] % 16 == 0
    )


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield for every code path the first matrix of the model that takes it, in true size."""
    inputs, seen = RandomInputs(model.dtype, 0), set[CodePath | None]([None])
    calls = ((weight, projection.one_token) for projection in model.projections for weight in projection.weights)
    for weight, one_token in calls:
        scales, biases, bits, group_size = weight.scales, weight.biases, weight.bits, weight.group_size
        assert scales is not None
        assert biases is not None
        assert bits is not None
        assert group_size is not None
        drawn: QuantizedWeight | None = None
        for tokens in (1, MOST_TOKENS) if one_token else (MOST_TOKENS,):
            stand_in = mx.zeros((tokens, weight.columns), model.dtype)
            path = code_path(stand_in, weight.weight, scales, biases, bits, group_size)
            if path not in seen:
                seen.add(path)
                drawn = drawn or _drawn(inputs, weight)
                yield _sample(inputs.normal(tokens, weight.columns), drawn, bits, group_size)


def _drawn(inputs: RandomInputs, weight: QuantizedWeight) -> QuantizedWeight:
    rows = len(weight.weight)
    if rows <= _DRAWN_ROWS:
        return inputs.like(weight)
    return _rows_of(inputs.like(weight, _DRAWN_ROWS), mx.arange(rows) % _DRAWN_ROWS)


def _rows_of(weight: QuantizedWeight, rows: mx.array) -> QuantizedWeight:
    assert weight.scales is not None
    assert weight.biases is not None
    # On CUDA, MLX compiles modules for an array of indices, for seconds.
    parts = [mx.take(part, rows, axis=0, stream=mx.cpu) for part in (weight.weight, weight.scales, weight.biases)]
    mx.eval(parts)
    codes, scales, biases = parts
    return QuantizedWeight(codes, scales, biases, weight.bits, weight.group_size)


def _sample(x: mx.array, weight: QuantizedWeight, bits: int, group_size: int) -> Sample:
    rows = len(weight.weight)
    compared = mx.array(sorted({*range(min(rows, _COMPARED_ROWS)), *range(max(0, rows - _COMPARED_ROWS), rows)}))
    part = _rows_of(weight, compared)
    return Sample(
        (x, weight.weight, weight.scales, weight.biases, bits, group_size),
        (x, part.weight, part.scales, part.biases, bits, group_size),
        lambda results: [mx.take(results[0], compared, axis=1, stream=mx.cpu)],
    )
