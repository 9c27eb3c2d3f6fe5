"""What a GatedDeltaNet layer does between its projections, in elementary operations, one token after the other.

Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv 2412.06464), equation 10; the
convolution, the decay and the gated norm around it as in transformers' ``Qwen3_5MoeGatedDeltaNet``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels.precision import wide

L2_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """One layer's own weights; every key head serves value heads / key heads consecutive value heads.

    ``convolution`` [channels, taps, 1] over [q | k | v]; ``a_log`` and ``dt_bias`` [value heads]; ``norm`` [Dv].
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    convolution: mx.array
    a_log: mx.array
    dt_bias: mx.array
    norm: mx.array
    eps: float

    @property
    def taps(self) -> int:
        """Tokens that the convolution sees."""
        return self.convolution.shape[1]

    def empty(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Past inputs of the convolution and state of a sequence that has not begun."""
        past = mx.zeros((self.taps - 1, self.convolution.shape[0]), dtype)
        return past, mx.zeros((1, self.value_heads, self.value_dim, self.key_dim))


GatedDelta = Callable[[mx.array, mx.array, mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]


def gated_delta(
    queries: mx.array, keys: mx.array, values: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """S = decay S; S = S + beta (v - S k) k^T; y = S q, for every token and value head.

    Args:
        queries: [1, T, key heads, Dk], normalised and scaled.
        keys: the same shape, normalised.
        values: [1, T, value heads, Dv].
        decay: [1, T, value heads], the factor itself.
        beta: [1, T, value heads].
        state: f32 [1, value heads, Dv, Dk].

    Returns:
        y [1, T, value heads, Dv] in the type of ``queries``, and the new state in f32.
    """
    groups = values.shape[2] // keys.shape[2]
    q, k = (mx.repeat(wide(part), groups, axis=2) for part in (queries, keys))
    v, decay, beta = (wide(part) for part in (values, decay, beta))
    outputs = []
    for t in range(queries.shape[1]):
        state = state * decay[:, t, :, None, None]
        recalled = (state * k[:, t, :, None, :]).sum(-1)
        change = beta[:, t, :, None] * (v[:, t] - recalled)
        state = state + change[..., None] * k[:, t, :, None, :]
        outputs.append((state * q[:, t, :, None, :]).sum(-1))
    return mx.stack(outputs, axis=1).astype(queries.dtype), state


def gated_delta_net(
    qkv: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    weights: DeltaWeights,
    past: mx.array,
    state: mx.array,
    rule: GatedDelta = gated_delta,
) -> tuple[mx.array, mx.array, mx.array]:
    """Convolution and SiLU, normalised q and k, decay and beta, the recurrence, gated RMSNorm.

    Args:
        qkv: [T, 2 key heads Dk + value heads Dv], the projections of T tokens.
        z: [T, value heads Dv].
        b: [T, value heads].
        a: [T, value heads].
        weights: the layer's own.
        past: [taps - 1, channels], what the convolution saw last.
        state: f32 [1, value heads, Dv, Dk].
        rule: an implementation of ``gated_delta``; gets everything in f32.

    Returns:
        y [T, value heads Dv] in the type of ``qkv``, and the new ``past`` and ``state``.
    """
    length, dtype = qkv.shape[0], qkv.dtype
    padded = mx.concatenate([past, qkv])
    taps = wide(weights.convolution[..., 0])
    mixed = sum(wide(padded[tap : tap + length]) * taps[:, tap] for tap in range(weights.taps))
    assert isinstance(mixed, mx.array)
    mixed = mixed * mx.sigmoid(mixed)
    key_width = weights.key_heads * weights.key_dim
    queries, keys, values = mx.split(mixed, [key_width, 2 * key_width], axis=-1)
    queries, keys = (
        _l2_normalised(part.reshape(1, length, weights.key_heads, weights.key_dim)) for part in (queries, keys)
    )
    values = values.reshape(1, length, weights.value_heads, weights.value_dim)

    beta = mx.sigmoid(wide(b))[None]
    rate = mx.exp(weights.a_log) * mx.logaddexp(wide(a) + weights.dt_bias, 0)
    y, state = rule(queries * weights.key_dim**-0.5, keys, values, mx.exp(-rate)[None], beta, state)

    gate = z.reshape(length, weights.value_heads, weights.value_dim).astype(mx.float32)
    y = mx.fast.rms_norm(wide(y.squeeze(0)), wide(weights.norm), weights.eps)
    y = (y * (gate * mx.sigmoid(gate))).astype(dtype)
    # Contiguous, or the slice would keep the whole chunk alive.
    return y.reshape(length, -1), mx.contiguous(padded[length:]), state


def _l2_normalised(x: mx.array) -> mx.array:
    return x * mx.rsqrt((x * x).sum(-1, keepdims=True) + L2_EPS)
