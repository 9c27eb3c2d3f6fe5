"""The kernel of GatedDeltaNet in the C++ extension."""

from collections.abc import Iterator
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


def code_path(inputs: DeltaInputs) -> CodePath | None:
    """Return the code path of ``gated_delta_net``; None if it does not support the inputs."""
    weights = inputs.weights
    supported = weights.key_dim % native.LANES == 0 and weights.value_dim % native.LANES == 0
    return (tokens_phrase(len(inputs.qkv)),) if supported and inputs.qkv.dtype == mx.float32 else None


def gated_delta_net(inputs: DeltaInputs) -> Results:
    """Compute ``reference.gated_delta_net`` in f32; write to both states in place."""
    weights = inputs.weights
    y = native.Output(inputs.z.shape)
    native.loaded().delta_net(
        inputs.qkv,
        inputs.z,
        inputs.b,
        inputs.a,
        len(inputs.qkv),
        weights.convolution,
        weights.a_log,
        weights.dt_bias,
        weights.norm,
        (weights.key_heads, weights.value_heads, weights.key_dim, weights.value_dim, weights.taps),
        weights.eps,
        inputs.conv_state,
        inputs.recurrent_state,
        y.buffer,
    )
    return y.array(), inputs.conv_state, inputs.recurrent_state


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield one token, and several tokens across the end of a tile.

    Samples have two key heads and their value heads: heads are independent of each other.
    """
    for weights in model.delta[:1]:
        heads, each = min(2, weights.key_heads), weights.value_heads // weights.key_heads
        geometry = Geometry(0, 0, 0, 0, 0, 0, heads, heads * each, weights.key_dim, weights.value_dim)
        for tokens in (1, ACROSS_TILES):
            drawn = delta_inputs(geometry, model.dtype, tokens=tokens, taps=weights.taps, eps=weights.eps)
            if code_path(drawn) is not None:
                conv_state, recurrent_state = (
                    mx.array(np.array(state)) for state in (drawn.conv_state, drawn.recurrent_state)
                )
                yield Sample((replace(drawn, conv_state=conv_state, recurrent_state=recurrent_state),), (drawn,))
