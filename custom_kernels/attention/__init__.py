"""What a full-attention layer does between its projections."""

from functools import cache

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.attention import reference
from flashmoe_mlx.custom_kernels.attention.reference import AttentionWeights
from flashmoe_mlx.custom_kernels.kernel import Kernel, bits_of, dialect, length_as_shape
from flashmoe_mlx.custom_kernels.nvidia import gpu

__all__ = ["AttentionWeights", "code_path", "fits", "fused_gated_attention", "gated_attention", "reference"]

_SCORES = 2**26
"""Most attention scores held at once; longer prompts go through in blocks of queries."""

_CACHE = ["keys", "values", "frequencies", "seen"]
PREPARE = Kernel(
    "attention",
    "prepare",
    ["q_and_gate", "k", "v", "q_norm", "k_norm", *_CACHE],
    ["queries"],
    ["functions"],
    in_place=["keys", "values"],
)
DECODE = Kernel(
    "attention", "decode", ["queries", "keys", "values", "seen"], ["partial", "peaks"], ["functions", "loads"]
)
MERGE = Kernel("attention", "merge", ["partial", "peaks", "q_and_gate"], ["y"], ["functions"])
_SIMDGROUPS = 8
_SPANS = 64
_TILE = 32
"""Keys of a tile on tensor cores."""
_BF16_PRODUCTS = 8
"""The first compute capability whose tensor cores multiply bf16."""
_MUCH_SHARED_MEMORY = 160 * 1024
_BLOCKS = 128
"""Threadgroups that fill a GPU on tensor cores, each with most of a multiprocessor's shared memory."""


@cache
def decode_on_tensor_cores(width: int, stages: int) -> Kernel:
    """``PREPARE`` and ``DECODE`` in one for heads of ``width``, with ``stages`` tiles of keys and values under way."""
    return Kernel(
        "attention",
        "decode_tensor",
        ["q_and_gate", "k", "v", "q_norm", "k_norm", *_CACHE],
        ["partial", "peaks"],
        ["functions", "mma", "tiles"],
        in_place=["keys", "values"],
        shared_memory=stages * _TILE * width * 2 * 2,
    )


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


def fits(weights: AttentionWeights, dtype: mx.Dtype) -> bool:
    """Whether ``fused_gated_attention`` takes a layer of this shape with activations of ``dtype``."""
    return dtype in (mx.float32, mx.bfloat16) and weights.head_dim % 32 == 0 and weights.head_dim <= 256


def code_path(
    q_and_gate: mx.array,
    k: mx.array,  # noqa: ARG001  # the operation's
    v: mx.array,  # noqa: ARG001
    weights: AttentionWeights,
    keys: mx.array,  # noqa: ARG001
    values: mx.array,  # noqa: ARG001
    start: int,  # noqa: ARG001
) -> tuple[str, ...] | None:
    """Name the code path of ``fused_gated_attention``; None if it does not take the arguments."""
    if not fits(weights, q_and_gate.dtype):
        return None
    if len(q_and_gate) > 1:
        return ("several tokens",)
    return "one token", "on tensor cores" if stages_on_tensor_cores(weights, q_and_gate.dtype) else ""


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
    seen = length_as_shape(end)
    template: dict[str, int | mx.Dtype] = {
        "T": dtype,
        "HEADS": heads,
        "KV_HEADS": weights.kv_heads,
        "DIM": width,
    }
    frequencies = _rotary(weights.rotary_dim, weights.theta, weights.frequencies)
    inputs = [q_and_gate, k, v, weights.q_norm, weights.k_norm, keys, values, frequencies, seen]
    norm_and_rotary: dict[str, int | mx.Dtype] = {"ROTARY": weights.rotary_dim, "EPS": bits_of(weights.eps)}
    if tokens == 1 and (stages := stages_on_tensor_cores(weights, dtype)):
        most_spans = max(32, _BLOCKS // weights.kv_heads // 32 * 32)
        tiles = -(-end // _TILE)
        spans = -(-tiles // -(-tiles // most_spans))
        partial, peaks = decode_on_tensor_cores(width, stages)(
            inputs,
            [((heads, spans, width), mx.float32), ((heads, spans, 2), mx.float32)],
            (spans, weights.kv_heads, 1),
            32 * _SIMDGROUPS,
            template
            | norm_and_rotary
            | {"KEYS": _TILE, "STAGES": stages, "SIMDGROUPS": _SIMDGROUPS, "MOST_SPANS": most_spans},
        )
        return _merged(partial, peaks, q_and_gate, template, most_spans), keys, values

    (queries,) = PREPARE(
        inputs,
        [((1, heads, tokens, width), dtype)],
        (heads + 2 * weights.kv_heads, tokens, 1),
        32,
        template | norm_and_rotary,
    )
    if tokens > 1:
        # The queries are an output of the kernel that wrote the cache, so what reads both comes after it.
        gate = q_and_gate.reshape(tokens, heads, 2, width)[:, :, 1]
        mixed = _attention(queries, keys[:, :, :end], values[:, :, :end])
        y = mixed.squeeze(0).swapaxes(0, 1) * mx.sigmoid(gate)
        return y.reshape(tokens, heads * width), keys, values

    spans = -(-end // max(_SIMDGROUPS, -(-end // _SPANS)))
    group = heads // weights.kv_heads
    at_once = next(count for count in (4, 2, 1) if group % count == 0)
    partial, peaks = DECODE(
        [queries, keys, values, seen],
        [((heads, spans, width), mx.float32), ((heads, spans, 2), mx.float32)],
        (spans, heads // at_once, 1),
        32 * _SIMDGROUPS,
        template | {"HEADS_AT_ONCE": at_once, "WIDTH": width // 32, "SIMDGROUPS": _SIMDGROUPS},
    )
    return _merged(partial, peaks, q_and_gate, template, _SPANS), keys, values


def _merged(
    partial: mx.array, peaks: mx.array, q_and_gate: mx.array, template: dict[str, int | mx.Dtype], most_spans: int
) -> mx.array:
    heads, _, width = partial.shape
    (y,) = MERGE(
        [partial, peaks, q_and_gate],
        [((1, heads * width), q_and_gate.dtype)],
        (heads, width // 32, 1),
        32 * _SIMDGROUPS,
        template | {"SIMDGROUPS": _SIMDGROUPS, "MOST_SPANS": most_spans},
    )
    return y


def stages_on_tensor_cores(weights: AttentionWeights, dtype: mx.Dtype) -> int:
    """Tiles under way at once if one token of this layer goes through NVIDIA's tensor cores, else 0."""
    fit = (
        dialect() == "cuda"
        and dtype == weights.q_norm.dtype == weights.k_norm.dtype == mx.bfloat16
        and weights.head_dim in (128, 256)
        and weights.rotary_dim % 64 == 0
        and 0 < weights.rotary_dim <= weights.head_dim
        and weights.heads // weights.kv_heads <= 16
    )
    return _stages_of_this_gpu() if fit else 0


def _stages_of_this_gpu() -> int:
    """Return 4 where a threadgroup gets 160 KB of shared memory and more, 2 with less, 0 without products of bf16."""
    if gpu().capability < _BF16_PRODUCTS:
        return 0
    return 4 if gpu().shared_memory >= _MUCH_SHARED_MEMORY else 2


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


def _rotated(x: mx.array, weights: AttentionWeights, start: int) -> mx.array:
    periods = None if weights.frequencies is None else _periods(weights.frequencies)
    base = weights.theta if periods is None else None
    return mx.fast.rope(x, weights.rotary_dim, traditional=False, base=base, scale=1.0, offset=start, freqs=periods)


@cache
def _periods(frequencies: tuple[float, ...]) -> mx.array:
    """Positions in which each pair turns by one radian, which is what MLX calls frequencies."""
    return mx.array(1.0 / np.array(frequencies), mx.float32)


@cache
def _rotary(rotary_dim: int, theta: float, frequencies: tuple[float, ...] | None) -> mx.array:
    """Return the turns [rotary_dim] that a position takes: rounded to f32, and after those what the rounding lost."""
    turns = reference.radians(rotary_dim, theta, frequencies) / (2 * np.pi)
    rounded = turns.astype(np.float32)
    host = mx.array(np.concatenate([rounded, (turns - rounded).astype(np.float32)]))
    array = host * 1  # a result is in the GPU's own memory
    mx.eval(array)
    return array
