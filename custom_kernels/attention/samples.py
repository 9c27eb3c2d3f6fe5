"""Random inputs of attention."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from flashmoe_mlx.custom_kernels.attention.reference import AttentionInputs, on_device
from flashmoe_mlx.custom_kernels.random_inputs import Geometry, RandomInputs
from flashmoe_mlx.custom_kernels.weights import AttentionWeights


def attention_inputs(
    geometry: Geometry,
    dtype: mx.Dtype,
    *,
    context: int,
    tokens: int = 1,
    seed: int = 0,
    theta: float = 1e7,
    eps: float = 1e-6,
    kv_bits: int | None = None,
    gated: bool = True,
    more_starts: Sequence[int] = (),
) -> AttentionInputs:
    """Draw tokens at the end of a filled cache, or one token of each of several sequences.

    Args:
        geometry: sizes of the layer.
        dtype: type of activations, weights and caches.
        context: number of tokens in the cache after the call.
        tokens: number of tokens of the call, part of ``context``.
        seed: seed of the random numbers.
        theta: base of the rotary embedding.
        eps: epsilon of the norms.
        kv_bits: width of cached keys and values.
        gated: whether queries have gates.
        more_starts: the positions of the tokens of further sequences, below ``context``; only with one token.
    """
    inputs = RandomInputs(dtype, seed)
    weights = AttentionWeights(
        geometry.heads,
        geometry.kv_heads,
        geometry.head_dim,
        geometry.rotary_dim,
        theta,
        inputs.normal(geometry.head_dim, scale=0.2, mean=1.0),
        inputs.normal(geometry.head_dim, scale=0.2, mean=1.0),
        eps,
        kv_bits=kv_bits,
        gated=gated,
    )
    width, kv_width = geometry.heads * weights.query_width, geometry.kv_heads * geometry.head_dim
    sequences = 1 + len(more_starts)
    room = (sequences, geometry.kv_heads, -(-context // 256) * 256, geometry.head_dim)
    tokens *= sequences
    return AttentionInputs(
        inputs.normal(tokens, width),
        inputs.normal(tokens, kv_width),
        inputs.normal(tokens, kv_width),
        weights,
        weights.rows.pack(inputs.normal(*room), dtype),
        weights.rows.pack(inputs.normal(*room), dtype),
        context - tokens,
        on_device([context - 1, *more_starts]) if more_starts else None,
    )


def without_codes(weights: AttentionWeights) -> Callable[[list[mx.array]], list[mx.array]]:
    """Return a function that leaves out quantized caches, whose codes differ by one where roundings differ."""
    return (lambda results: results[:1]) if weights.rows.quantized else (lambda results: results)
