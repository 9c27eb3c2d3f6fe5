"""What a GatedDeltaNet layer does between its projections."""

from functools import partial

import mlx.core as mx

from flashmoe_mlx.custom_kernels.gated_delta_net import chunked, reference
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import DeltaWeights, GatedDelta
from flashmoe_mlx.custom_kernels.kernel import Kernel, bits_of, dialect

__all__ = [
    "MOST_TOKENS",
    "DeltaWeights",
    "chunked",
    "code_path",
    "fits",
    "gated_delta_net",
    "in_chunks",
    "reference",
    "step",
]

MOST_TOKENS = 16
"""More tokens at once are worth the parallel route of a prompt, except on CUDA.

There ``step`` was the fastest for every prompt that was measured. On Metal MLX's own recurrence goes in chunks, and
nobody has compared the two.
"""

STEP = Kernel(
    "gated_delta_net",
    "step",
    ["qkv", "z", "b", "a", "convolution", "a_log", "dt_bias", "norm", "past", "state"],
    ["y", "new_past", "new_state"],
    ["functions"],
)


_FEWEST_IN_CHUNKS = {"cuda": 16, None: 2}
"""Tokens at once from which chunks beat MLX's recurrence; Metal is absent because MLX's goes in chunks itself there."""


def in_chunks(
    qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, weights: DeltaWeights, past: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """As ``reference.gated_delta_net``, the recurrence in chunks of tokens where MLX's would take them one by one."""
    device = dialect()
    rule: GatedDelta = chunked.gated_delta if device else chunked.gated_delta_on_host
    if len(qkv) < _FEWEST_IN_CHUNKS.get(device, len(qkv) + 1):
        rule = partial(_mlx_rule, qkv.dtype)
    return reference.gated_delta_net(qkv, z, b, a, weights, past, state, rule)


def rule_of_prompts() -> str:
    """What ``in_chunks`` runs for a prompt on the default device, for the record of a run."""
    names = {"metal": "mx.fast.gated_delta_update", "cuda": "chunks by MLX's products", None: "chunks by numpy"}
    return names[dialect()]


def gated_delta_net(
    qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, weights: DeltaWeights, past: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """As ``reference.gated_delta_net``, with MLX's fused recurrence."""
    return reference.gated_delta_net(qkv, z, b, a, weights, past, state, partial(_mlx_rule, qkv.dtype))


def _mlx_rule(
    dtype: mx.Dtype,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    decay: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    queries, keys, values = (part.astype(dtype) for part in (queries, keys, values))
    y, state = mx.fast.gated_delta_update(queries, keys, values, decay, beta, state)
    return y, state


def fits(weights: DeltaWeights) -> bool:
    """Whether ``step`` takes a layer of this shape."""
    return weights.key_dim % 32 == 0 and weights.value_dim % 16 == 0 and weights.value_dim * weights.key_dim <= 2**15


def code_path(
    qkv: mx.array,
    z: mx.array,  # noqa: ARG001  # the operation's
    b: mx.array,  # noqa: ARG001
    a: mx.array,  # noqa: ARG001
    weights: DeltaWeights,
    past: mx.array,  # noqa: ARG001
    state: mx.array,  # noqa: ARG001
) -> tuple[str, ...] | None:
    """Name the code path of ``step``; None if it is not made for the arguments."""
    if not fits(weights) or (len(qkv) > MOST_TOKENS and dialect() != "cuda"):
        return None
    return ("one token" if len(qkv) == 1 else "several tokens",)


def step(
    qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, weights: DeltaWeights, past: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """As ``reference.gated_delta_net``, one token after the other in one dispatch; ``weights`` must fit."""
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
            "EPS": bits_of(weights.eps),
        },
    )
    return y, past, state
