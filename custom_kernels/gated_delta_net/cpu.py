"""The kernel of GatedDeltaNet in the C++ extension."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.custom_kernels.checks import CodePath, Sample, tokens_phrase
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import DeltaInputs, Results
from flashmoe_mlx.custom_kernels.gated_delta_net.samples import delta_inputs
from flashmoe_mlx.custom_kernels.native.reduced import ACROSS_TILES
from flashmoe_mlx.custom_kernels.random_inputs import Geometry
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.custom_kernels.weights import DeltaWeights


def supports(weights: DeltaWeights, dtype: mx.Dtype) -> bool:
    """Return whether the kernel supports a layer with activations of type ``dtype``."""
    return weights.key_dim % native.LANES == 0 and weights.value_dim % native.LANES == 0 and dtype == mx.float32


def code_path(inputs: DeltaInputs) -> CodePath | None:
    """Return the code path of ``gated_delta_net``; None if it does not support the inputs."""
    return (tokens_phrase(len(inputs.qkv)),) if supports(inputs.weights, inputs.qkv.dtype) else None


def gated_delta_net(inputs: DeltaInputs) -> Results:
    """Compute ``reference.gated_delta_net`` in f32; write to both states in place."""
    projected = inputs.qkv, inputs.z, inputs.b, inputs.a
    y = recur(projected, inputs.weights, [inputs.conv_state], [inputs.recurrent_state], [len(inputs.qkv)])
    return y, inputs.conv_state, inputs.recurrent_state


def recur(
    projected: tuple[mx.array, mx.array, mx.array, mx.array],
    weights: DeltaWeights,
    conv_states: Sequence[mx.array],
    recurrent_states: Sequence[mx.array],
    lengths: list[int],
) -> mx.array:
    """Compute the outputs of several sequences, and write to their states; see ``DeltaBatch``."""
    y = native.Output((sum(lengths), weights.value_heads * weights.value_dim))
    native.loaded().delta_net(
        *projected,
        lengths,
        weights.convolution,
        weights.a_log,
        weights.dt_bias,
        weights.norm,
        (weights.key_heads, weights.value_heads, weights.key_dim, weights.value_dim, weights.taps),
        weights.eps,
        list(conv_states),
        list(recurrent_states),
        y.buffer,
    )
    return y.array()


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield one token, and several tokens across the end of a tile."""
    for weights in model.delta[:1]:
        for tokens in (1, ACROSS_TILES):
            expected = drawn(weights, model.dtype, tokens)
            if code_path(expected) is not None:
                states = (mx.array(np.array(state)) for state in (expected.conv_state, expected.recurrent_state))
                conv_state, recurrent_state = states
                yield Sample((replace(expected, conv_state=conv_state, recurrent_state=recurrent_state),), (expected,))


def drawn(weights: DeltaWeights, dtype: mx.Dtype, tokens: int) -> DeltaInputs:
    """Draw ``tokens`` for two of the layer's key heads and their value heads: heads are independent of each other."""
    heads, each = min(2, weights.key_heads), weights.value_heads // weights.key_heads
    geometry = Geometry(0, 0, 0, 0, 0, 0, heads, heads * each, weights.key_dim, weights.value_dim)
    return delta_inputs(geometry, dtype, tokens=tokens, taps=weights.taps, eps=weights.eps)
