"""The kernels of quantized matrices times a few vectors for GPUs, in one dispatch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from flashmoe_mlx.custom_kernels.checks import CodePath, Sample, tokens_phrase
from flashmoe_mlx.custom_kernels.kernel import Kernel, bits_of, dialect
from flashmoe_mlx.custom_kernels.nvidia import COPY_ENGINE, Gpu, gpu
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.custom_kernels.weights import QuantizedWeight, format_name

MOST_TOKENS = 8
_CHUNK = 32
_ROWS = 4
_INPUTS = ["x", "weight", "scales", "biases"]
_STREAM_CHUNK = 512
_STREAM_SIMDGROUPS = 8
_SIMDGROUPS = 4
_DEPTH = 4
"""Steps whose weights are in flight at once."""
_DRAWN_ROWS = 4099
"""Rows of a sample that are drawn; a larger matrix repeats them. Not a multiple of any block of the kernels."""
_COMPARED_ROWS = 128
"""Rows at either end of a sample's matrix whose products are compared."""


@cache
def body_kernel(with_norm: bool = False, with_residual: bool = False) -> Kernel:
    """Return the kernel of Metal and CUDA: for a vector to be normalized first, and with a residual to add, or not."""
    outputs, switches = _variant(with_norm, with_residual)
    inputs = [*_INPUTS, *["norm"] * with_norm, *["residual"] * with_residual]
    return Kernel(__package__, "body", inputs, outputs, ["functions", "loads", "codes"], switches)


@cache
def tensor_kernel(with_residual: bool = False) -> Kernel:
    """Return the kernel for several vectors on tensor cores."""
    inputs = [*_INPUTS, *["residual"] * with_residual]
    return Kernel(__package__, "tensor", inputs, ["y"], ["mma", "tensor_codes"], {"WITH_RESIDUAL": with_residual})


def _variant(with_norm: bool, with_residual: bool) -> tuple[list[str], dict[str, bool]]:
    outputs = ["y", "normed"] if with_norm else ["y"]
    return outputs, {"WITH_NORM": with_norm, "WITH_RESIDUAL": with_residual}


def code_path(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    bits: int,
    group_size: int,
    residual: mx.array | None = None,
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
    form, added = format_name(bits, group_size, scales.dtype), "" if residual is None else "added to a residual"
    if len(x) == 1:
        return tokens_phrase(1), form, f"{weight.shape[0]} x {x.shape[1]}", added
    tensor = "on tensor cores" if on_tensor_cores(x, weight, scales, bits, group_size) else ""
    return f"2 to {MOST_TOKENS} tokens", form, tensor, added


def quantized_matvec(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    bits: int,
    group_size: int,
    residual: mx.array | None = None,
) -> mx.array:
    """Compute ``reference.quantized_matvec`` for arguments with a ``code_path``."""
    return run([x, weight, scales, biases], bits, group_size, residual)[0]


def run(
    inputs: list[mx.array],
    bits: int,
    group_size: int,
    residual: mx.array | None = None,
    norm: tuple[mx.array, float] | None = None,
) -> list[mx.array]:
    """Run one dispatch.

    Args:
        inputs: the vectors, and the three parts of the matrix.
        bits: width of a code.
        group_size: codes that share a scale and a bias.
        residual: added to the product, or None.
        norm: factors and epsilon of an RMS norm of the only vector, not on ``on_tensor_cores``; or None.

    Returns:
        The product, and with ``norm`` the normalized vector.
    """
    x, weight, scales, _ = inputs
    tokens, columns = x.shape
    outputs = weight.shape[0]
    template: dict[str, int | mx.Dtype] = {
        "T": x.dtype,
        "COLUMNS": columns,
        "OUTPUTS": outputs,
        "BITS": bits,
        "GROUP": group_size,
    }
    results: list[tuple[tuple[int, ...], mx.Dtype]] = [((tokens, outputs), x.dtype)]
    with_norm, with_residual = norm is not None, residual is not None
    if norm is not None:
        inputs = [*inputs, norm[0]]
        results.append((x.shape, x.dtype))
        template["EPS"] = bits_of(norm[1])
    if residual is not None:
        inputs = [*inputs, residual]
    plan = stream_plan_of(x, weight, scales, bits, group_size)
    if plan is not None:
        kernel, groups = stream_kernel(plan.shared_memory, with_norm, with_residual), (plan.threadgroups, 1, 1)
        return kernel(inputs, results, groups, 32 * _STREAM_SIMDGROUPS, {**template, **plan.template})
    if on_tensor_cores(x, weight, scales, bits, group_size):
        assert norm is None
        kernel, groups = tensor_kernel(with_residual), (outputs // 16, tokens, 1)
        own: dict[str, int | mx.Dtype] = {"SIMDGROUPS": _SIMDGROUPS, "DEPTH": _DEPTH}
        return kernel(inputs, results, groups, 32 * _SIMDGROUPS, template | own)
    threads = min(256, -(-columns // (32 * _CHUNK)) * 32)
    own = {"S": scales.dtype, "TOKENS": tokens, "ROWS": _ROWS, "THREADS": threads}
    kernel = body_kernel(with_norm, with_residual)
    return kernel(inputs, results, (outputs // _ROWS, 1, 1), threads, template | own)


@cache
def stream_kernel(shared_memory: int, with_norm: bool = False, with_residual: bool = False) -> Kernel:
    """Return the kernel for one vector on tensor cores with ``shared_memory`` bytes; see ``body_kernel``."""
    outputs, switches = _variant(with_norm, with_residual)
    return Kernel(
        __package__,
        "stream",
        [*_INPUTS, *["norm"] * with_norm, *["residual"] * with_residual],
        outputs,
        ["functions", "mma", "copy_engine", "tensor_stream"],
        switches,
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


def stream_plan_of(x: mx.array, weight: mx.array, scales: mx.array, bits: int, group_size: int) -> StreamPlan | None:
    """Return the plan of a product with one vector on the default device, or None; see ``stream_plan``."""
    if dialect() != "cuda" or len(x) != 1 or not x.dtype == scales.dtype == mx.bfloat16:
        return None
    return stream_plan(weight.shape[0], x.shape[1], bits, group_size, gpu())


def on_tensor_cores(x: mx.array, weight: mx.array, scales: mx.array, bits: int, group_size: int) -> bool:
    """Return whether products without a ``StreamPlan`` run on NVIDIA's tensor cores."""
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
    calls = ((weight, projection) for projection in model.projections for weight in projection.weights)
    for weight, projection in calls:
        scales, biases, bits, group_size = weight.scales, weight.biases, weight.bits, weight.group_size
        assert scales is not None
        assert biases is not None
        assert bits is not None
        assert group_size is not None
        drawn: QuantizedWeight | None = None
        for tokens in (1, MOST_TOKENS) if projection.one_token and not projection.normed else (MOST_TOKENS,):
            stand_in = mx.zeros((tokens, weight.columns), model.dtype)
            residual = inputs.normal(tokens, len(weight.weight)) if projection.residual else None
            path = code_path(stand_in, weight.weight, scales, biases, bits, group_size, residual)
            if path not in seen:
                seen.add(path)
                drawn = drawn or drawn_like(inputs, weight)
                yield _sample(inputs.normal(tokens, weight.columns), drawn, bits, group_size, residual)


def drawn_like(inputs: RandomInputs, weight: QuantizedWeight) -> QuantizedWeight:
    """Draw a matrix of the size and format of ``weight``; the rows of a large matrix repeat."""
    rows = len(weight.weight)
    if rows <= _DRAWN_ROWS:
        return inputs.like(weight)
    return rows_of(inputs.like(weight, _DRAWN_ROWS), mx.arange(rows) % _DRAWN_ROWS)


def rows_of(weight: QuantizedWeight, rows: mx.array) -> QuantizedWeight:
    """Return the rows ``rows`` of a quantized matrix."""
    assert weight.scales is not None
    assert weight.biases is not None
    # On CUDA, MLX compiles modules for an array of indices, for seconds.
    parts = [mx.take(part, rows, axis=0, stream=mx.cpu) for part in (weight.weight, weight.scales, weight.biases)]
    mx.eval(parts)
    codes, scales, biases = parts
    return QuantizedWeight(codes, scales, biases, weight.bits, weight.group_size)


def compared_rows(rows: int) -> mx.array:
    """Return the rows of a sample's matrix whose products are compared."""
    return mx.array(sorted({*range(min(rows, _COMPARED_ROWS)), *range(max(0, rows - _COMPARED_ROWS), rows)}))


def _sample(x: mx.array, weight: QuantizedWeight, bits: int, group_size: int, residual: mx.array | None) -> Sample:
    compared = compared_rows(len(weight.weight))
    part = rows_of(weight, compared)
    return Sample(
        (x, weight.weight, weight.scales, weight.biases, bits, group_size, residual),
        (
            *(x, part.weight, part.scales, part.biases, bits, group_size),
            None if residual is None else mx.take(residual, compared, axis=1, stream=mx.cpu),
        ),
        lambda results: [mx.take(results[0], compared, axis=1, stream=mx.cpu)],
    )
