"""The kernel of RMS norm in the C++ extension."""

from collections.abc import Iterator

import mlx.core as mx

from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.custom_kernels.checks import CodePath, Sample, tokens_phrase
from flashmoe_mlx.custom_kernels.native.reduced import FEW
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.shapes import ModelShapes


def code_path(x: mx.array, weight: mx.array, eps: float) -> CodePath | None:  # noqa: ARG001  # the signature of the operation
    """Return the code path of ``rms_norm``; None if it does not support the arguments."""
    return (tokens_phrase(len(x)),) if x.ndim == 2 and x.dtype == weight.dtype == mx.float32 else None


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Compute x / rms(x) * weight for ``x`` [T, width] in f32."""
    y = native.Output(x.shape)
    native.loaded().rms_norm(x, *x.shape, weight, eps, y.buffer)
    return y.array()


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield one vector and several vectors."""
    inputs = RandomInputs(mx.float32, 0)
    weight = inputs.normal(model.hidden_size)
    for tokens in (1, FEW):
        arguments = (inputs.normal(tokens, model.hidden_size), weight, 1e-6)
        if model.dtype == mx.float32 and code_path(*arguments) is not None:
            yield Sample(arguments)
