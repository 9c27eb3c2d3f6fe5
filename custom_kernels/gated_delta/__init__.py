"""The gated delta rule, the recurrence of GatedDeltaNet layers."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.gated_delta import reference

__all__ = ["gated_delta", "reference"]


def gated_delta(
    queries: mx.array, keys: mx.array, values: mx.array, decay: mx.array, beta: mx.array, state: mx.array | None
) -> tuple[mx.array, mx.array]:
    """As ``reference.gated_delta``, by MLX's fused operation."""
    out, state = mx.fast.gated_delta_update(queries, keys, values, decay, beta, state)
    return out, state
