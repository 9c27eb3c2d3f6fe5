"""The kernel of quantized matrices times vectors in the C++ extension; several matrices share a call."""

from collections.abc import Iterator, Sequence

import mlx.core as mx

from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.custom_kernels.checks import CodePath, Sample
from flashmoe_mlx.custom_kernels.native.reduced import FEW, MANY, ROWS, reduced, tile_ends
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.shapes import ModelShapes, Projection
from flashmoe_mlx.custom_kernels.weights import QuantizedWeight


def code_path(
    x: mx.array, weights: Sequence[QuantizedWeight], residual: mx.array | None = None, activations: str = "f32"
) -> CodePath | None:
    """Return the code path of ``products``; None if it does not support the arguments."""
    if x.dtype != mx.float32 or not all(native.supports_weight(weight) for weight in weights):
        return None
    how = "added to a residual" if residual is not None else "one matrix" if len(weights) == 1 else "several matrices"
    formats = " and ".join(dict.fromkeys(weight.format_name for weight in weights))
    return *native.tokens_phrases(len(x), activations), formats, how


def products(
    x: mx.array, weights: Sequence[QuantizedWeight], residual: mx.array | None = None, activations: str = "f32"
) -> tuple[mx.array, ...]:
    """Compute ``Products`` for ``x`` in f32 and any number of vectors; see ``native.ACTIVATIONS``."""
    tokens = len(x)
    matrices = tuple([native.matrix(weight) for weight in weights])
    results = [native.Output((tokens, matrix[3]), residual) for matrix in matrices]
    buffers, rounding = tuple([y.buffer for y in results]), native.ACTIVATIONS.index(activations)
    native.loaded().products(x, tokens, matrices, buffers, residual is not None, rounding)
    return tuple([y.array() for y in results])


def quantized_matvec(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> mx.array:
    """Compute ``reference.quantized_matvec`` for ``x`` in f32 and any number of vectors."""
    return products(x, [QuantizedWeight(weight, scales, biases, bits, group_size)])[0]


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield for every code path the first call of the model that takes it, with few rows of true length."""
    inputs, seen = RandomInputs(model.dtype, 0), set[CodePath | None]([None])
    for projection in model.projections:
        drawn: tuple[QuantizedWeight, ...] | None = None
        for tokens in (1, FEW, MANY):
            columns = projection.weights[0].columns
            residual = mx.zeros(1) if projection.residual else None
            path = code_path(mx.zeros((tokens, columns), model.dtype), projection.weights, residual)
            if path in seen:
                continue
            seen.add(path)
            drawn = drawn or tuple(
                inputs.like(weight, reduced(len(weight.weight), ROWS)) for weight in projection.weights
            )
            yield _sample(inputs, projection, drawn, tokens, columns)


def _sample(
    inputs: RandomInputs, projection: Projection, weights: tuple[QuantizedWeight, ...], tokens: int, columns: int
) -> Sample:
    x = inputs.normal(tokens, columns)
    residual = inputs.normal(tokens, len(weights[0].weight)) if projection.residual else None
    compared = tile_ends(tokens)
    expected = (x[compared], weights, None if residual is None else residual[compared])
    return Sample((x, weights, residual), expected, lambda results: [y[compared] for y in results])
