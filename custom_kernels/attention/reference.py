"""What a full-attention layer does between its projections, in elementary operations.

Source: transformers ``Qwen3_5MoeAttention``: norms of queries and keys, rotary embedding of part of each head, causal
grouped-query attention, an output gate beside every query.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels.precision import wide


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """One layer's own weights; ``q_norm`` and ``k_norm`` [D]. The first ``rotary_dim`` of D dimensions are rotated.

    Pair i of rotary_dim / 2 turns by ``theta ** (-2 i / rotary_dim)`` radians for each position, or by
    ``frequencies[i]`` where these are given.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    theta: float
    q_norm: mx.array
    k_norm: mx.array
    eps: float
    frequencies: tuple[float, ...] | None = None

    def turns(self) -> npt.NDArray[np.float64]:
        """Return the radians [rotary_dim / 2] by which each pair is turned for each position."""
        return radians(self.rotary_dim, self.theta, self.frequencies)


@cache
def radians(rotary_dim: int, theta: float, frequencies: tuple[float, ...] | None) -> npt.NDArray[np.float64]:
    """Return ``frequencies``, or where there are none the powers of ``theta``, as an array [rotary_dim / 2]."""
    pairs = rotary_dim // 2
    made = np.asarray(theta ** (-np.arange(pairs) / pairs) if frequencies is None else frequencies, np.float64)
    made.setflags(write=False)  # it is shared
    return made


Attend = Callable[[mx.array, mx.array, mx.array], mx.array]


def attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """softmax(Q K^T / sqrt(D)) V; the last query sees the last key, each query before it one key less.

    Args:
        queries: [1, heads, T, D].
        keys: [1, kv heads, S, D] with S >= T; every kv head serves heads / kv heads consecutive heads.
        values: the same shape as ``keys``.

    Returns:
        [1, heads, T, D] in the type of ``queries``; the sums are in f32.
    """
    _, heads, length, width = queries.shape
    groups = heads // keys.shape[1]
    keys, values = (mx.repeat(wide(part), groups, axis=1) for part in (keys, values))
    scores = wide(queries) @ keys.swapaxes(-1, -2) * width**-0.5
    span = keys.shape[2]
    seen = mx.arange(span)[None, :] <= mx.arange(span - length, span)[:, None]
    scores = mx.where(seen, scores, -mx.inf)
    return (mx.softmax(scores, axis=-1) @ values).astype(queries.dtype)


def rotate(x: mx.array, weights: AttentionWeights, start: int) -> mx.array:
    """Rotate the first ``rotary_dim`` dimensions of ``x`` [1, heads, T, D], whose positions begin at ``start``."""
    rotary_dim = weights.rotary_dim
    pairs = rotary_dim // 2
    angles = np.outer(np.arange(start, start + x.shape[2]), weights.turns())
    cosine, sine = (mx.array(part(angles), wide(x).dtype) for part in (np.cos, np.sin))
    low, high, rest = mx.split(wide(x), [pairs, rotary_dim], axis=-1)
    rotated = mx.concatenate([low * cosine - high * sine, high * cosine + low * sine, rest], axis=-1)
    return rotated.astype(x.dtype)


def gated_attention(
    q_and_gate: mx.array,
    k: mx.array,
    v: mx.array,
    weights: AttentionWeights,
    keys: mx.array,
    values: mx.array,
    start: int,
    attend: Attend = attention,
    rotated: Callable[[mx.array, AttentionWeights, int], mx.array] = rotate,
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries and keys normalised and rotated, the cache extended, attention, the output gate.

    Args:
        q_and_gate: [T, heads * 2 D], of every head its query and then its gate.
        k: [T, kv heads * D].
        v: the same.
        weights: the layer's own.
        keys: the cache, [1, kv heads, capacity, D], filled up to ``start``, with room for T more.
        values: the same.
        start: position of the first of the T tokens.
        attend: an implementation of ``attention``.
        rotated: an implementation of ``rotate``.

    Returns:
        [T, heads * D], and the caches.
    """
    length, end = q_and_gate.shape[0], start + q_and_gate.shape[0]
    queries, gate = mx.split(q_and_gate.reshape(length, weights.heads, 2 * weights.head_dim), 2, axis=-1)
    new_keys, new_values = (part.reshape(length, weights.kv_heads, weights.head_dim) for part in (k, v))

    def placed(x: mx.array, norm: mx.array) -> mx.array:
        normed = mx.fast.rms_norm(x, norm, weights.eps).swapaxes(0, 1)[None]
        return rotated(normed, weights, start)

    keys[:, :, start:end] = placed(new_keys, weights.k_norm)
    values[:, :, start:end] = new_values.swapaxes(0, 1)[None]
    mixed = attend(placed(queries, weights.q_norm), keys[:, :, :end], values[:, :, :end])
    y = mixed.squeeze(0).swapaxes(0, 1) * mx.sigmoid(gate)
    return y.reshape(length, weights.heads * weights.head_dim), keys, values
