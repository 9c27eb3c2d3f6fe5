"""The part of a full-attention layer between its projections, in elementary operations.

Sources: transformers ``Qwen3_5MoeAttention`` and ``Qwen3MoeAttention``: RMS norms of queries and keys, rotary embedding
of a part or all of each head, causal grouped-query attention; in the former an output gate for every query.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.precision import widen
from flashmoe_mlx.custom_kernels.weights import AttentionWeights


@dataclass(slots=True)
class AttentionInputs:
    """Arguments of the operation for T tokens of one sequence, or one token of each of T; D is the width of a head.

    Not frozen: a frozen dataclass takes ten times as long to construct, and every layer constructs one per step.

    Attributes:
        q_and_gate: [T, heads * 2 D], for every head its query, then its gate; without gates, queries [T, heads * D].
        k: keys of the T tokens, [T, kv_heads * D].
        v: values of the T tokens, [T, kv_heads * D].
        weights: weights of the layer.
        keys: cache of keys, rows of ``weights.rows`` [sequences, kv_heads, capacity, width], filled up to the new
            tokens, with room for them.
        values: cache of values, of the same shape.
        start: position of the first of the T tokens.
        position: the position of the token of each sequence, int32 [max(4, sequences)] on a GPU; None to use ``start``,
            for one sequence. With it, kernels can be traced once for all positions.
    """

    q_and_gate: mx.array
    k: mx.array
    v: mx.array
    weights: AttentionWeights
    keys: mx.array
    values: mx.array
    start: int
    position: mx.array | None = None

    @property
    def sequences(self) -> int:
        """The number of sequences; of more than one, each has one token."""
        return self.keys.shape[0]

    def each(self) -> Iterator["AttentionInputs"]:
        """Yield the arguments of each of several sequences."""
        assert self.position is not None
        starts = np.array(self.position)
        for row in range(self.sequences):
            own = slice(row, row + 1)
            yield AttentionInputs(
                self.q_and_gate[own],
                self.k[own],
                self.v[own],
                self.weights,
                self.keys[own],
                self.values[own],
                int(starts[row]),
            )


def on_device(positions: Sequence[int]) -> mx.array:
    """Return ``AttentionInputs.position`` for the token of each sequence, lazily.

    The result of an operation is in the memory of a GPU, unless it is smaller than 16 bytes.
    """
    return mx.array([*positions, *[0] * (4 - len(positions))], mx.int32) + 0


Results = tuple[mx.array, mx.array, mx.array]
Attend = Callable[[mx.array, mx.array, mx.array], mx.array]
Rotate = Callable[[mx.array, AttentionWeights, int], mx.array]


def attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Compute softmax(Q K^T / sqrt(D)) V; the last query sees all keys, each earlier query one key fewer.

    Args:
        queries: [1, heads, T, D].
        keys: [1, kv_heads, S, D] with S >= T; every kv head serves heads / kv_heads consecutive heads.
        values: shape of ``keys``.

    Returns:
        [1, heads, T, D] in the type of ``queries``; sums are in f32.
    """
    _, heads, length, width = queries.shape
    groups = heads // keys.shape[1]
    keys, values = (mx.repeat(widen(part), groups, axis=1) for part in (keys, values))
    scores = widen(queries) @ keys.swapaxes(-1, -2) * width**-0.5
    span = keys.shape[2]
    visible = mx.arange(span)[None, :] <= mx.arange(span - length, span)[:, None]
    scores = mx.where(visible, scores, -mx.inf)
    return (mx.softmax(scores, axis=-1) @ values).astype(queries.dtype)


def rotate(x: mx.array, weights: AttentionWeights, start: int) -> mx.array:
    """Rotate the first ``rotary_dim`` dimensions of ``x`` [1, heads, T, D], whose positions begin at ``start``."""
    rotary_dim = weights.rotary_dim
    pairs = rotary_dim // 2
    angles = np.outer(np.arange(start, start + x.shape[2]), weights.rotations())
    cosine, sine = (mx.array(part(angles), widen(x).dtype) for part in (np.cos, np.sin))
    low, high, rest = mx.split(widen(x), [pairs, rotary_dim], axis=-1)
    rotated = mx.concatenate([low * cosine - high * sine, high * cosine + low * sine, rest], axis=-1)
    return rotated.astype(x.dtype)


def gated_attention(inputs: AttentionInputs, attend: Attend = attention, rotate: Rotate = rotate) -> Results:
    """Normalize and rotate queries and keys, extend the cache, attend, apply the output gate if there is one.

    Args:
        inputs: see ``AttentionInputs``.
        attend: an implementation of ``attention``.
        rotate: an implementation of ``rotate``.

    Returns:
        The outputs [T, heads * D], and the caches of keys and values.
    """
    if inputs.sequences > 1:
        results = [gated_attention(one, attend, rotate) for one in inputs.each()]
        y, keys, values = (mx.concatenate(list(parts)) for parts in zip(*results, strict=True))
        return y, keys, values
    weights, keys, values, start = inputs.weights, inputs.keys, inputs.values, inputs.start
    length = inputs.q_and_gate.shape[0]
    end = start + length
    queries, gate = mx.split(
        inputs.q_and_gate.reshape(length, weights.heads, weights.query_width), [weights.head_dim], axis=-1
    )
    new_keys, new_values = (part.reshape(length, weights.kv_heads, weights.head_dim) for part in (inputs.k, inputs.v))

    def placed(x: mx.array, norm: mx.array) -> mx.array:
        normed = mx.fast.rms_norm(x, norm, weights.eps).swapaxes(0, 1)[None]
        return rotate(normed, weights, start)

    rows, dtype = weights.rows, inputs.q_and_gate.dtype
    keys[:, :, start:end] = rows.pack(placed(new_keys, weights.k_norm), dtype)
    values[:, :, start:end] = rows.pack(new_values.swapaxes(0, 1)[None], dtype)
    seen = (rows.unpack(cache[:, :, :end], dtype) for cache in (keys, values))
    mixed = attend(placed(queries, weights.q_norm), *seen)
    y = mixed.squeeze(0).swapaxes(0, 1)
    if weights.gated:
        y = y * mx.sigmoid(gate)
    return y.reshape(length, weights.heads * weights.head_dim), keys, values
