"""What a full-attention layer does between its projections."""

from functools import cache

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.attention import reference
from flashmoe_mlx.custom_kernels.attention.reference import AttentionWeights
from flashmoe_mlx.custom_kernels.kernel import Kernel, constant

__all__ = ["AttentionWeights", "fits", "fused_gated_attention", "gated_attention", "reference", "reference_on_copies"]

_SCORES = 2**26
"""Most attention scores held at once; longer prompts go through in blocks of queries."""

PREPARE = Kernel(
    "attention",
    "prepare",
    ["q_and_gate", "k", "v", "q_norm", "k_norm", "keys", "values", "frequencies", "eps", "place"],
    ["queries"],
    in_place=["keys", "values"],
)
DECODE = Kernel(
    "attention", "decode", ["queries", "keys", "values", "place"], ["partial", "peaks"], ["functions", "loads"]
)
MERGE = Kernel("attention", "merge", ["partial", "peaks", "q_and_gate", "place"], ["y"], ["functions"])
_SIMDGROUPS = 8
_SPANS = 64


def gated_attention(
    q_and_gate: mx.array,
    k: mx.array,
    v: mx.array,
    weights: AttentionWeights,
    keys: mx.array,
    values: mx.array,
    start: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """As ``reference.gated_attention``, by MLX's fused operations."""
    return reference.gated_attention(q_and_gate, k, v, weights, keys, values, start, _attention, _rotated)


def reference_on_copies(
    q_and_gate: mx.array,
    k: mx.array,
    v: mx.array,
    weights: AttentionWeights,
    keys: mx.array,
    values: mx.array,
    start: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """As ``reference.gated_attention``, leaving the caches as they are."""
    return reference.gated_attention(q_and_gate, k, v, weights, keys * 1, values * 1, start)


def fits(weights: AttentionWeights, dtype: mx.Dtype) -> bool:
    """Whether ``fused_gated_attention`` takes a layer of this shape with activations of ``dtype``."""
    return dtype in (mx.float32, mx.bfloat16) and weights.head_dim % 32 == 0 and weights.head_dim <= 256


def fused_gated_attention(
    q_and_gate: mx.array,
    k: mx.array,
    v: mx.array,
    weights: AttentionWeights,
    keys: mx.array,
    values: mx.array,
    start: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """As ``reference.gated_attention``, with the cache written in place; ``weights`` must fit.

    ``keys`` and ``values`` must be evaluated, contiguous, and in use by nothing that is still to be computed.
    """
    tokens, dtype = q_and_gate.shape[0], q_and_gate.dtype
    heads, width = weights.heads, weights.head_dim
    end = start + tokens
    span = max(_SIMDGROUPS, -(-end // _SPANS))
    spans = -(-end // span)
    # Length, capacity, keys a span, spans, start, tokens.
    place = constant(mx.int32, end, keys.shape[2], span, spans, start, tokens)
    template: dict[str, int | mx.Dtype] = {
        "T": dtype,
        "HEADS": heads,
        "KV_HEADS": weights.kv_heads,
        "DIM": width,
    }
    frequencies, eps = _rotary(weights.rotary_dim, weights.theta), constant(mx.float32, weights.eps)
    (queries,) = PREPARE(
        [q_and_gate, k, v, weights.q_norm, weights.k_norm, keys, values, frequencies, eps, place],
        [((1, heads, tokens, width), dtype)],
        (heads + 2 * weights.kv_heads, tokens, 1),
        32,
        template | {"ROTARY": weights.rotary_dim},
    )
    if tokens > 1:
        # The queries are an output of the kernel that wrote the cache, so what reads both comes after it.
        gate = q_and_gate.reshape(tokens, heads, 2, width)[:, :, 1]
        mixed = _attention(queries, keys[:, :, :end], values[:, :, :end])
        y = mixed.squeeze(0).swapaxes(0, 1) * mx.sigmoid(gate)
        return y.reshape(tokens, heads * width), keys, values

    group = heads // weights.kv_heads
    at_once = next(count for count in (4, 2, 1) if group % count == 0)
    partial, peaks = DECODE(
        [queries, keys, values, place],
        [((heads, spans, width), mx.float32), ((heads, spans, 2), mx.float32)],
        (spans, heads // at_once, 1),
        32 * _SIMDGROUPS,
        template | {"HEADS_AT_ONCE": at_once, "WIDTH": width // 32, "SIMDGROUPS": _SIMDGROUPS},
    )
    (y,) = MERGE([partial, peaks, q_and_gate, place], [((1, heads * width), dtype)], (heads, 1, 1), width, template)
    return y, keys, values


def _attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    length, span = queries.shape[2], keys.shape[2]
    step = max(1, _SCORES // (queries.shape[1] * span))
    blocks = []
    for begin in range(0, length, step):
        end = min(begin + step, length)
        seen = span - length + end
        block = queries[:, :, begin:end]
        # A single query sees every key, and MLX is faster without a mask.
        mask = "causal" if block.shape[2] > 1 else None
        scale = queries.shape[-1] ** -0.5
        blocks.append(
            mx.fast.scaled_dot_product_attention(block, keys[:, :, :seen], values[:, :, :seen], scale=scale, mask=mask)
        )
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def _rotated(x: mx.array, rotary_dim: int, theta: float, start: int) -> mx.array:
    return mx.fast.rope(x, rotary_dim, traditional=False, base=theta, scale=1.0, offset=start)


@cache
def _rotary(rotary_dim: int, theta: float) -> mx.array:
    """Turns a token, rounded to f32, and after those what the rounding lost."""
    pairs = rotary_dim // 2
    turns = theta ** (-np.arange(pairs) / pairs) / (2 * np.pi)
    rounded = turns.astype(np.float32)
    array = mx.array(np.concatenate([rounded, (turns - rounded).astype(np.float32)]))
    mx.eval(array)
    return array
