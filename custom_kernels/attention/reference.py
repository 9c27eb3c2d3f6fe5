"""Causal grouped-query attention in elementary operations."""

import mlx.core as mx


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
    keys, values = (mx.repeat(part.astype(mx.float32), groups, axis=1) for part in (keys, values))
    scores = queries.astype(mx.float32) @ keys.swapaxes(-1, -2) * width**-0.5
    span = keys.shape[2]
    seen = mx.arange(span)[None, :] <= mx.arange(span - length, span)[:, None]
    scores = mx.where(seen, scores, -mx.inf)
    return (mx.softmax(scores, axis=-1) @ values).astype(queries.dtype)
