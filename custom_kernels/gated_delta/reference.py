"""The gated delta rule in elementary operations, one token after the other.

Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv 2412.06464), equation 10.
"""

import mlx.core as mx


def gated_delta(
    queries: mx.array, keys: mx.array, values: mx.array, decay: mx.array, beta: mx.array, state: mx.array | None
) -> tuple[mx.array, mx.array]:
    """S = decay S; S = S + beta (v - S k) k^T; y = S q, for every token and value head.

    Args:
        queries: [1, T, key heads, Dk], normalised and scaled.
        keys: the same shape, normalised. Every key head serves value heads / key heads consecutive value heads.
        values: [1, T, value heads, Dv].
        decay: [1, T, value heads], the factor itself.
        beta: [1, T, value heads].
        state: f32 [1, value heads, Dv, Dk], or None for zeros.

    Returns:
        y [1, T, value heads, Dv] in the type of ``queries``, and the new state in f32.
    """
    heads, width = values.shape[2:]
    groups = heads // keys.shape[2]
    q, k = (mx.repeat(part.astype(mx.float32), groups, axis=2) for part in (queries, keys))
    v, decay, beta = (part.astype(mx.float32) for part in (values, decay, beta))
    if state is None:
        state = mx.zeros((1, heads, width, keys.shape[3]))
    outputs = []
    for t in range(queries.shape[1]):
        state = state * decay[:, t, :, None, None]
        recalled = (state * k[:, t, :, None, :]).sum(-1)
        change = beta[:, t, :, None] * (v[:, t] - recalled)
        state = state + change[..., None] * k[:, t, :, None, :]
        outputs.append((state * q[:, t, :, None, :]).sum(-1))
    return mx.stack(outputs, axis=1).astype(queries.dtype), state
