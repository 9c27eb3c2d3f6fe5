"""The kernel of attention in the C++ extension."""

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.custom_kernels.attention.reference import AttentionInputs, Results
from flashmoe_mlx.custom_kernels.attention.samples import attention_inputs
from flashmoe_mlx.custom_kernels.checks import CodePath, Sample, tokens_phrase
from flashmoe_mlx.custom_kernels.native.reduced import ACROSS_TILES, reduced
from flashmoe_mlx.custom_kernels.random_inputs import Geometry
from flashmoe_mlx.custom_kernels.shapes import ModelShapes


def code_path(inputs: AttentionInputs) -> CodePath | None:
    """Return the code path of ``gated_attention``; None if it does not support the inputs."""
    supported = inputs.weights.head_dim % native.LANES == 0 and inputs.q_and_gate.dtype == mx.float32
    return (tokens_phrase(len(inputs.q_and_gate)),) if supported else None


def gated_attention(inputs: AttentionInputs) -> Results:
    """Compute ``reference.gated_attention`` in f32; write to the caches in place."""
    weights, keys, values = inputs.weights, inputs.keys, inputs.values
    tokens, heads, dim = len(inputs.k), weights.heads, weights.head_dim
    y = native.Output((tokens, heads * dim))
    native.loaded().attention(
        inputs.q_and_gate,
        inputs.k,
        inputs.v,
        tokens,
        weights.q_norm,
        weights.k_norm,
        (heads, weights.kv_heads, dim, weights.rotary_dim, keys.shape[2], inputs.start),
        weights.rotations(),
        weights.eps,
        keys,
        values,
        y.buffer,
    )
    return y.array(), keys, values


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield one token after several spans of keys, and several tokens across the end of a tile.

    Samples have two kv heads, each with a few query heads.
    """
    for weights in model.attention[:1]:
        kv_heads, group = min(2, weights.kv_heads), reduced(weights.heads // weights.kv_heads, 8)
        geometry = Geometry(0, 0, kv_heads * group, kv_heads, weights.head_dim, weights.rotary_dim, 0, 0, 0, 0)
        for tokens, start in ((1, 300), (ACROSS_TILES, 5)):
            drawn = attention_inputs(
                geometry, model.dtype, context=start + tokens, tokens=tokens, theta=weights.theta, eps=weights.eps
            )
            # Other properties of the layer, such as its rotary embedding, are kept.
            own = replace(
                weights,
                heads=drawn.weights.heads,
                kv_heads=kv_heads,
                q_norm=drawn.weights.q_norm,
                k_norm=drawn.weights.k_norm,
            )
            expected = replace(drawn, weights=own)
            if code_path(expected) is not None:
                keys, values = (mx.array(np.array(cache)) for cache in (drawn.keys, drawn.values))
                yield Sample((replace(expected, keys=keys, values=values),), (expected,))
