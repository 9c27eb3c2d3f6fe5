"""The kernel for GPUs: one vector, in one dispatch."""

from collections.abc import Iterator
from functools import partial

import mlx.core as mx

from flashmoe_mlx.custom_kernels.checks import CodePath, Sample
from flashmoe_mlx.custom_kernels.quantized_matvec import gpu as matvec
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.shapes import ModelShapes

_EPS = 1e-6


def code_path(
    x: mx.array,
    norm: mx.array,
    eps: float,  # noqa: ARG001  # the signature of the operation
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    bits: int,
    group_size: int,
) -> CodePath | None:
    """Return the code path of ``normed_matvec``; None if it does not support the arguments."""
    if len(x) > 1 or norm.dtype != x.dtype:
        return None
    return matvec.code_path(x, weight, scales, biases, bits, group_size)


def normed_matvec(
    x: mx.array,
    norm: mx.array,
    eps: float,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    bits: int,
    group_size: int,
) -> tuple[mx.array, mx.array]:
    """Compute ``reference.normed_matvec`` for arguments with a ``code_path``.

    Tensor cores without the copy engine take two dispatches.
    """
    matrix = (weight, scales, biases)
    planned = matvec.stream_plan_of(x, weight, scales, bits, group_size) is not None
    if not planned and matvec.on_tensor_cores(x, weight, scales, bits, group_size):
        normed = mx.fast.rms_norm(x, norm, eps)
        return matvec.quantized_matvec(normed, *matrix, bits, group_size), normed
    y, normed = matvec.run([x, *matrix], bits, group_size, norm=(norm, eps))
    return y, normed


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield for every code path the first matrix of the model that takes it, in true size."""
    inputs, seen = RandomInputs(model.dtype, 0), set[CodePath | None]([None])
    for weight in (weight for projection in model.projections if projection.normed for weight in projection.weights):
        assert weight.scales is not None
        assert weight.biases is not None
        assert weight.bits is not None
        assert weight.group_size is not None
        x, norm = inputs.normal(1, weight.columns), inputs.normal(weight.columns)
        shape = (weight.weight, weight.scales, weight.biases, weight.bits, weight.group_size)
        path = code_path(x, norm, _EPS, *shape)
        if path in seen:
            continue
        seen.add(path)
        drawn = matvec.drawn_like(inputs, weight)
        compared = matvec.compared_rows(len(drawn.weight))
        part = matvec.rows_of(drawn, compared)
        rest = (weight.bits, weight.group_size)
        yield Sample(
            (x, norm, _EPS, drawn.weight, drawn.scales, drawn.biases, *rest),
            (x, norm, _EPS, part.weight, part.scales, part.biases, *rest),
            partial(_compared, compared),
        )


def _compared(rows: mx.array, results: list[mx.array]) -> list[mx.array]:
    return [mx.take(results[0], rows, axis=1, stream=mx.cpu), results[1]]  # see ``quantized_matvec.gpu.rows_of``
