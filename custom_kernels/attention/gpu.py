"""The kernels of attention for GPUs.

One token, or one token of each of several sequences, takes two dispatches on NVIDIA's tensor cores and three elsewhere.
Several tokens of one sequence take one dispatch, followed by MLX's attention.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.attention.mlx import attention
from flashmoe_mlx.custom_kernels.attention.reference import AttentionInputs, Results
from flashmoe_mlx.custom_kernels.attention.samples import attention_inputs, without_codes
from flashmoe_mlx.custom_kernels.checks import CodePath, Sample, tokens_phrase
from flashmoe_mlx.custom_kernels.kernel import Kernel, after, bits_of, dialect
from flashmoe_mlx.custom_kernels.nvidia import gpu
from flashmoe_mlx.custom_kernels.random_inputs import Geometry
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.custom_kernels.weights import AttentionWeights, rotations

_CACHE = ["keys", "values", "frequencies", "position"]
PREPARE = Kernel(
    __package__,
    "prepare",
    ["q_and_gate", "k", "v", "q_norm", "k_norm", *_CACHE],
    ["queries"],
    ["functions", "loads", "rows"],
    in_place=["keys", "values"],
)
DECODE = Kernel(
    __package__,
    "decode",
    ["queries", "keys", "values", "position"],
    ["partial", "peaks"],
    ["functions", "loads", "rows"],
)
MERGE = Kernel(__package__, "merge", ["partial", "peaks", "q_and_gate"], ["y"], ["functions"])
_SIMDGROUPS = 8
_SPANS = 64
_GROWTH = 256
"""Tokens by which KV caches grow. Spans divide the length rounded up to it, so sums do not depend on capacities."""
_TILE = 32
"""Keys of a tile on tensor cores."""
_BF16_PRODUCTS = 8
"""The first major compute capability whose tensor cores multiply bf16."""
_MUCH_SHARED_MEMORY = 160 * 1024
_BLOCKS = 128
"""Threadgroups that fill a GPU on tensor cores, each with most of a multiprocessor's shared memory."""


@cache
def decode_on_tensor_cores(width: int, stages: int) -> Kernel:
    """Return ``PREPARE`` and ``DECODE`` in one kernel, for heads of ``width``, with ``stages`` tiles in flight."""
    return Kernel(
        __package__,
        "decode_tensor",
        ["q_and_gate", "k", "v", "q_norm", "k_norm", *_CACHE],
        ["partial", "peaks"],
        ["functions", "mma", "tiles"],
        in_place=["keys", "values"],
        shared_memory=stages * _TILE * width * 2 * 2,
    )


def code_path(inputs: AttentionInputs) -> CodePath | None:
    """Return the code path of ``gated_attention``; None if it does not support the inputs."""
    weights, dtype, tokens = inputs.weights, inputs.q_and_gate.dtype, len(inputs.q_and_gate)
    if dtype not in (mx.float32, mx.bfloat16) or weights.head_dim % 32 or weights.head_dim > 256:
        return None
    if not weights.rows.is_supported:
        return None
    together = inputs.sequences > 1
    count = "one token of each sequence" if together else tokens_phrase(tokens)
    phrases = count, weights.rows.phrase, weights.gate_phrase
    if tokens > 1 and not together:
        return phrases
    return *phrases, "on tensor cores" if stages_on_tensor_cores(weights, dtype) else ""


def gated_attention(inputs: AttentionInputs) -> Results:
    """Compute ``reference.gated_attention`` for inputs with a ``code_path``; write to the caches in place.

    The caches must be evaluated, contiguous, and unused by all computations still to run.
    """
    q_and_gate, weights, keys, values = inputs.q_and_gate, inputs.weights, inputs.keys, inputs.values
    tokens, dtype, sequences = q_and_gate.shape[0], q_and_gate.dtype, inputs.sequences
    heads, width = weights.heads, weights.head_dim
    capacity = keys.shape[2]
    position = _on_device(inputs.start) if inputs.position is None else inputs.position
    template: dict[str, int | mx.Dtype] = {
        "T": dtype,
        "HEADS": heads,
        "KV_HEADS": weights.kv_heads,
        "DIM": width,
        "GATED": int(weights.gated),
    }
    frequencies = _rotary(weights.rotary_dim, weights.theta, weights.frequencies)
    arrays = [q_and_gate, inputs.k, inputs.v, weights.q_norm, weights.k_norm, keys, values, frequencies, position]
    cached: dict[str, int | mx.Dtype] = {
        "KV": keys.dtype,
        "ROW": weights.rows.width,
        "GROUP": weights.rows.group_size,
        "BITS": weights.kv_bits if weights.rows.quantized and weights.kv_bits else 0,
    }
    norm_and_rotary: dict[str, int | mx.Dtype] = {"ROTARY": weights.rotary_dim, "EPS": bits_of(weights.eps)}
    one_token = tokens == sequences
    if one_token and (stages := stages_on_tensor_cores(weights, dtype)):
        most_spans = max(32, _BLOCKS // weights.kv_heads // 32 * 32)
        tiles = -(-capacity // _TILE)
        spans = -(-tiles // -(-tiles // most_spans))
        partial, peaks = decode_on_tensor_cores(width, stages)(
            arrays,
            [((sequences * heads, spans, width), mx.float32), ((sequences * heads, spans, 2), mx.float32)],
            (spans, weights.kv_heads, sequences),
            32 * _SIMDGROUPS,
            template
            | norm_and_rotary
            | {"KEYS": _TILE, "STAGES": stages, "SIMDGROUPS": _SIMDGROUPS, "MOST_SPANS": most_spans, "GROWTH": _GROWTH},
        )
        return _merged(partial, peaks, q_and_gate, template, most_spans), keys, values

    (queries,) = PREPARE(
        arrays,
        [((1, heads, tokens, width), dtype)],
        (heads + 2 * weights.kv_heads, tokens, 1),
        32,
        template | norm_and_rotary | cached,
    )
    if not one_token:
        end = inputs.start + tokens
        seen = [cache[:, :, :end] for cache in (keys, values)]
        if keys.dtype != dtype:
            seen = [weights.rows.unpack(after(queries, rows), dtype) for rows in seen]
        mixed = attention(queries, *seen)
        y = mixed.squeeze(0).swapaxes(0, 1)
        if weights.gated:
            y = y * mx.sigmoid(q_and_gate.reshape(tokens, heads, 2, width)[:, :, 1])
        return y.reshape(tokens, heads * width), keys, values

    spans = -(-capacity // max(_SIMDGROUPS, -(-capacity // _SPANS)))
    group = heads // weights.kv_heads
    at_once = next(count for count in (4, 2, 1) if group % count == 0)
    partial, peaks = DECODE(
        [queries, keys, values, position],
        [((sequences * heads, spans, width), mx.float32), ((sequences * heads, spans, 2), mx.float32)],
        (spans, heads // at_once, sequences),
        32 * _SIMDGROUPS,
        template
        | cached
        | {"HEADS_AT_ONCE": at_once, "WIDTH": width // 32, "SIMDGROUPS": _SIMDGROUPS}
        | {"MOST_SPANS": _SPANS, "GROWTH": _GROWTH},
    )
    return _merged(partial, peaks, q_and_gate, template, _SPANS), keys, values


def _merged(
    partial: mx.array, peaks: mx.array, q_and_gate: mx.array, template: dict[str, int | mx.Dtype], most_spans: int
) -> mx.array:
    heads, _, width = partial.shape
    (y,) = MERGE(
        [partial, peaks, q_and_gate],
        [((len(q_and_gate), heads * width // len(q_and_gate)), q_and_gate.dtype)],
        (heads, width // 32, 1),
        32 * _SIMDGROUPS,
        template | {"SIMDGROUPS": _SIMDGROUPS, "MOST_SPANS": most_spans},
    )
    return y


def stages_on_tensor_cores(weights: AttentionWeights, dtype: mx.Dtype) -> int:
    """Return the number of tiles in flight if one token runs on NVIDIA's tensor cores, else 0."""
    supported = (
        dialect() == "cuda"
        and not weights.rows.quantized
        and dtype == weights.q_norm.dtype == weights.k_norm.dtype == mx.bfloat16
        and weights.head_dim in (128, 256)
        and weights.rotary_dim % 64 == 0
        and 0 < weights.rotary_dim <= weights.head_dim
        and weights.heads // weights.kv_heads <= 16
    )
    return _stages_on_this_gpu() if supported else 0


def _stages_on_this_gpu() -> int:
    """Return 4 where a threadgroup has at least 160 KiB of shared memory, 2 with less, 0 without bf16 products."""
    if gpu().capability < _BF16_PRODUCTS:
        return 0
    return 4 if gpu().shared_memory >= _MUCH_SHARED_MEMORY else 2


@lru_cache(maxsize=16)
def _on_device(start: int) -> mx.array:
    """Return ``AttentionInputs.position``, and do not wait for it: that would take until all earlier work is done."""
    position = mx.full((4,), start, mx.int32)  # MLX keeps smaller arrays in memory shared with the host
    mx.async_eval(position)  # type: ignore[no-untyped-call]  # no other thread can evaluate a lazy array
    return position


@cache
def _rotary(rotary_dim: int, theta: float, frequencies: tuple[float, ...] | None) -> mx.array:
    """Return the revolutions per position rounded to f32, followed by their rounding errors, [rotary_dim]."""
    revolutions = rotations(rotary_dim, theta, frequencies) / (2 * np.pi)
    rounded = revolutions.astype(np.float32)
    host = mx.array(np.concatenate([rounded, (revolutions - rounded).astype(np.float32)]))
    array = host * 1  # the result of an operation is in the memory of the GPU
    mx.eval(array)
    return array


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield one token after a context, several tokens, and one token of each of two sequences, with true sizes."""
    for weights in model.attention[:1]:
        geometry = Geometry(0, 0, weights.heads, weights.kv_heads, weights.head_dim, weights.rotary_dim, 0, 0, 0, 0)
        for tokens, start, more in ((1, 300, ()), (5, 70, ()), (1, 40, (7,))):
            drawn = attention_inputs(
                geometry,
                model.dtype,
                context=start + tokens,
                tokens=tokens,
                theta=weights.theta,
                eps=weights.eps,
                kv_bits=weights.kv_bits,
                gated=weights.gated,
                more_starts=more,
            )
            # Other properties of the layer, such as its rotary embedding, are kept.
            own = replace(weights, q_norm=drawn.weights.q_norm, k_norm=drawn.weights.k_norm)
            expected = replace(drawn, weights=own)
            written = [mx.contiguous(cache * 1) for cache in (drawn.keys, drawn.values)]
            mx.eval(written)
            inputs = replace(expected, keys=written[0], values=written[1])
            if code_path(inputs) is not None:
                yield Sample((inputs,), (expected,), of_both=without_codes(weights))
