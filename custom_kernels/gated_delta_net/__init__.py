"""What a GatedDeltaNet layer does between its projections."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.gated_delta_net import reference
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import DeltaWeights
from flashmoe_mlx.custom_kernels.kernel import Kernel, constant

__all__ = ["MOST_TOKENS", "DeltaWeights", "fits", "gated_delta_net", "reference", "step"]

MOST_TOKENS = 16
"""More tokens at once are worth the parallel route of a prompt."""

STEP = Kernel(
    "gated_delta_net",
    "step",
    ["qkv", "z", "b", "a", "convolution", "a_log", "dt_bias", "norm", "past", "state", "eps", "count"],
    ["y", "new_past", "new_state"],
    ["functions"],
)


def gated_delta_net(
    qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, weights: DeltaWeights, past: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """As ``reference.gated_delta_net``, with MLX's fused recurrence."""
    return reference.gated_delta_net(qkv, z, b, a, weights, past, state, _rule)


def _rule(
    queries: mx.array, keys: mx.array, values: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    y, state = mx.fast.gated_delta_update(queries, keys, values, decay, beta, state)
    return y, state


def fits(weights: DeltaWeights) -> bool:
    """Whether ``step`` takes a layer of this shape."""
    return weights.key_dim % 32 == 0 and weights.value_dim % 16 == 0 and weights.value_dim * weights.key_dim <= 2**15


def step(
    qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, weights: DeltaWeights, past: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """As ``reference.gated_delta_net`` for a few tokens, in one dispatch; ``weights`` must fit."""
    simdgroups = 16
    y, past, state = STEP(
        [
            qkv,
            z,
            b,
            a,
            weights.convolution,
            weights.a_log,
            weights.dt_bias,
            weights.norm,
            past,
            state,
            constant(mx.float32, weights.eps),
            constant(mx.int32, qkv.shape[0]),
        ],
        [(z.shape, qkv.dtype), (past.shape, past.dtype), (state.shape, mx.float32)],
        (weights.value_heads, 1, 1),
        32 * simdgroups,
        {
            "T": qkv.dtype,
            "KEY_HEADS": weights.key_heads,
            "VALUE_HEADS": weights.value_heads,
            "KEY_DIM": weights.key_dim,
            "VALUE_DIM": weights.value_dim,
            "TAPS": weights.taps,
            "ROWS": weights.value_dim // simdgroups,
            "COLUMNS": weights.key_dim // 32,
            "THREADS": 32 * simdgroups,
        },
    )
    return y, past, state
