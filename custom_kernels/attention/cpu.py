"""The kernel of attention in the C++ extension."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx

from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.custom_kernels.attention.reference import AttentionInputs, Results
from flashmoe_mlx.custom_kernels.attention.samples import attention_inputs, without_codes
from flashmoe_mlx.custom_kernels.checks import CodePath, Sample, tokens_phrase
from flashmoe_mlx.custom_kernels.native.reduced import ACROSS_TILES, reduced
from flashmoe_mlx.custom_kernels.random_inputs import Geometry
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.custom_kernels.weights import AttentionWeights


def supports(weights: AttentionWeights, dtype: mx.Dtype) -> bool:
    """Return whether the kernel supports a layer with activations of type ``dtype``."""
    return weights.head_dim % native.LANES == 0 and weights.rows.is_supported and dtype == mx.float32


def code_path(inputs: AttentionInputs) -> CodePath | None:
    """Return the code path of ``gated_attention``; None if it does not support the inputs."""
    supported = supports(inputs.weights, inputs.q_and_gate.dtype)
    if not supported:
        return None
    return tokens_phrase(len(inputs.q_and_gate)), inputs.weights.rows.phrase, inputs.weights.gate_phrase


def gated_attention(inputs: AttentionInputs) -> Results:
    """Compute ``reference.gated_attention`` in f32; write to the caches in place."""
    projected, keys, values = (inputs.q_and_gate, inputs.k, inputs.v), inputs.keys, inputs.values
    y = attend(projected, inputs.weights, [keys], [values], [inputs.start], [len(inputs.k)])
    return y, keys, values


def attend(
    projected: tuple[mx.array, mx.array, mx.array],
    weights: AttentionWeights,
    keys: Sequence[mx.array],
    values: Sequence[mx.array],
    starts: list[int],
    lengths: list[int],
) -> mx.array:
    """Compute the outputs of several sequences, and write to their caches; see ``AttentionBatch``."""
    heads, dim = weights.heads, weights.head_dim
    y = native.Output((sum(lengths), heads * dim))
    native.loaded().attention(
        *projected,
        lengths,
        starts,
        [cache.shape[2] for cache in keys],
        weights.q_norm,
        weights.k_norm,
        (heads, weights.kv_heads, dim, weights.rotary_dim, weights.kv_bits or 32, weights.rows.group_size),
        weights.rotations(),
        weights.eps,
        weights.gated,
        list(keys),
        list(values),
        y.buffer,
    )
    return y.array()


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield one token after several spans of keys, and several tokens across the end of a tile."""
    for weights in model.attention[:1]:
        for tokens, start in ((1, 300), (ACROSS_TILES, 5)):
            expected = drawn(weights, model.dtype, tokens, start)
            if code_path(expected) is not None:
                keys, values = (copied(cache) for cache in (expected.keys, expected.values))
                yield Sample(
                    (replace(expected, keys=keys, values=values),), (expected,), of_both=without_codes(expected.weights)
                )


def copied(cache: mx.array) -> mx.array:
    """Return a copy that a kernel may write to."""
    copy = cache * 1
    mx.eval(copy)
    return copy


def drawn(weights: AttentionWeights, dtype: mx.Dtype, tokens: int, start: int) -> AttentionInputs:
    """Draw ``tokens`` from position ``start`` on, for two of the layer's kv heads with a few query heads each."""
    kv_heads, group = min(2, weights.kv_heads), reduced(weights.heads // weights.kv_heads, 8)
    geometry = Geometry(0, 0, kv_heads * group, kv_heads, weights.head_dim, weights.rotary_dim, 0, 0, 0, 0)
    inputs = attention_inputs(
        geometry,
        dtype,
        context=start + tokens,
        tokens=tokens,
        theta=weights.theta,
        eps=weights.eps,
        kv_bits=weights.kv_bits,
        gated=weights.gated,
    )
    # Other properties of the layer, such as its rotary embedding, are kept.
    own = inputs.weights
    kept = replace(weights, heads=own.heads, kv_heads=kv_heads, q_norm=own.q_norm, k_norm=own.k_norm)
    return replace(inputs, weights=kept)
