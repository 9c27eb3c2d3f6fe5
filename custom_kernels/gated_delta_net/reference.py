"""The part of a GatedDeltaNet layer between its projections, in elementary operations, token by token.

Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv 2412.06464), equation 10; the
convolution, the decay and the gated norm as in transformers' ``Qwen3_5MoeGatedDeltaNet``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels.precision import widen
from flashmoe_mlx.custom_kernels.weights import DeltaWeights

L2_EPS = 1e-6


@dataclass(slots=True)
class DeltaInputs:
    """Arguments of the operation for T tokens; Dk and Dv are the widths of a key and a value head.

    The tokens belong to one sequence, or in equal numbers to several sequences, one sequence after the other.

    Not frozen: a frozen dataclass takes ten times as long to construct, and every layer constructs one per step.

    Attributes:
        qkv: [T, 2 key_heads * Dk + value_heads * Dv].
        z: input of the output gate, [T, value_heads * Dv].
        b: input of beta, [T, value_heads].
        a: input of the decay, [T, value_heads].
        weights: weights of the layer.
        conv_state: the last inputs of the convolution, [taps - 1, channels] or [sequences, taps - 1, channels].
        recurrent_state: f32 [sequences, value_heads, Dv, Dk].
    """

    qkv: mx.array
    z: mx.array
    b: mx.array
    a: mx.array
    weights: DeltaWeights
    conv_state: mx.array
    recurrent_state: mx.array

    @property
    def sequences(self) -> int:
        """The number of sequences."""
        return self.recurrent_state.shape[0]

    def each(self) -> Iterator["DeltaInputs"]:
        """Yield the arguments of each of several sequences."""
        tokens = len(self.qkv) // self.sequences
        for row in range(self.sequences):
            own = slice(row * tokens, (row + 1) * tokens)
            states = self.conv_state[row], self.recurrent_state[row : row + 1]
            yield DeltaInputs(self.qkv[own], self.z[own], self.b[own], self.a[own], self.weights, *states)


Results = tuple[mx.array, mx.array, mx.array]
GatedDelta = Callable[[mx.array, mx.array, mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]


def gated_delta(
    queries: mx.array, keys: mx.array, values: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Compute S = decay S; S = S + beta (v - S k) k^T; y = S q, for every token and value head.

    Args:
        queries: [1, T, key_heads, Dk], normalized and scaled.
        keys: [1, T, key_heads, Dk], normalized.
        values: [1, T, value_heads, Dv].
        decay: the factor, not its logarithm, [1, T, value_heads].
        beta: [1, T, value_heads].
        state: f32 [1, value_heads, Dv, Dk].

    Returns:
        y [1, T, value_heads, Dv] in the type of ``queries``, and the new state in f32.
    """
    groups = values.shape[2] // keys.shape[2]
    q, k = (mx.repeat(widen(part), groups, axis=2) for part in (queries, keys))
    v, decay, beta = (widen(part) for part in (values, decay, beta))
    outputs = []
    for t in range(queries.shape[1]):
        state = state * decay[:, t, :, None, None]
        recalled = (state * k[:, t, :, None, :]).sum(-1)
        change = beta[:, t, :, None] * (v[:, t] - recalled)
        state = state + change[..., None] * k[:, t, :, None, :]
        outputs.append((state * q[:, t, :, None, :]).sum(-1))
    return mx.stack(outputs, axis=1).astype(queries.dtype), state


def gated_delta_net(inputs: DeltaInputs, rule: GatedDelta = gated_delta) -> Results:
    """Compute convolution and SiLU, normalized q and k, decay and beta, the recurrence, the gated RMS norm.

    Args:
        inputs: see ``DeltaInputs``.
        rule: an implementation of ``gated_delta``; its arguments are in f32.

    Returns:
        y [T, value_heads * Dv] in the type of ``qkv``, and the new ``conv_state`` and ``recurrent_state``.
    """
    if inputs.sequences > 1:
        results = [gated_delta_net(one, rule) for one in inputs.each()]
        outputs, conv_states, states = (list(parts) for parts in zip(*results, strict=True))
        return mx.concatenate(outputs), mx.stack(conv_states), mx.concatenate(states)
    qkv, weights = inputs.qkv, inputs.weights
    length, dtype = qkv.shape[0], qkv.dtype
    padded = mx.concatenate([inputs.conv_state, qkv])
    taps = widen(weights.convolution[..., 0])
    mixed = sum(widen(padded[tap : tap + length]) * taps[:, tap] for tap in range(weights.taps))
    assert isinstance(mixed, mx.array)
    mixed = mixed * mx.sigmoid(mixed)
    key_width = weights.key_heads * weights.key_dim
    queries, keys, values = mx.split(mixed, [key_width, 2 * key_width], axis=-1)
    queries, keys = (
        _l2_normalized(part.reshape(1, length, weights.key_heads, weights.key_dim)) for part in (queries, keys)
    )
    values = values.reshape(1, length, weights.value_heads, weights.value_dim)

    beta = mx.sigmoid(widen(inputs.b))[None]
    rate = mx.exp(weights.a_log) * mx.logaddexp(widen(inputs.a) + weights.dt_bias, 0)
    scaled = queries * weights.key_dim**-0.5
    y, state = rule(scaled, keys, values, mx.exp(-rate)[None], beta, inputs.recurrent_state)

    gate = inputs.z.reshape(length, weights.value_heads, weights.value_dim).astype(mx.float32)
    y = mx.fast.rms_norm(widen(y.squeeze(0)), widen(weights.norm), weights.eps)
    y = (y * (gate * mx.sigmoid(gate))).astype(dtype)
    # A contiguous copy; a view would keep the whole chunk alive.
    return y.reshape(length, -1), mx.contiguous(padded[length:]), state


def _l2_normalized(x: mx.array) -> mx.array:
    return x * mx.rsqrt((x * x).sum(-1, keepdims=True) + L2_EPS)
