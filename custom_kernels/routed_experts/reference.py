"""The routed experts of a few tokens, and the shared expert, in elementary operations."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.expert_format import ExpertFormat
from flashmoe_mlx.custom_kernels.expert_mlp.reference import expert_mlp
from flashmoe_mlx.custom_kernels.precision import widen
from flashmoe_mlx.custom_kernels.weights import ExpertWeights


def routed_experts(
    x: mx.array,
    slab: mx.array,
    rows: mx.array,
    routing_weights: mx.array,
    form: ExpertFormat,
    shared: ExpertWeights | None = None,
    residual: mx.array | None = None,
    apply: Callable[[mx.array, ExpertWeights], mx.array] = expert_mlp,
) -> mx.array:
    """Compute y[t] = sum over k of routing_weights[t, k] * expert[rows[t, k]](x[t]).

    With a shared expert, add routing_weights[t, K] * shared(x[t]); with a residual, add residual[t].

    Args:
        x: [T, hidden].
        slab: records, uint8 [records, record_bytes].
        rows: row of ``slab`` of each expert, int32 [T, K]; -1 for a choice to skip.
        routing_weights: f32 [T, K]; [T, K + 1] with a shared expert, whose weight is the last.
        form: format of the records.
        shared: an expert for every token, or None.
        residual: [T, hidden] in the type of ``x`` or in f32, or None.
        apply: an implementation of ``expert_mlp``.

    Returns:
        [T, hidden] in the type of ``residual``, or of ``x`` without one; sums are in f32.
    """
    x_wide = widen(x)
    y = mx.zeros(x.shape, x_wide.dtype)
    for (token, choice), row in np.ndenumerate(np.array(rows)):
        if row >= 0:
            expert = form.expert(slab[row : row + 1].reshape(-1))
            one = slice(token, token + 1)  # MLX compiles a module on CUDA for an index
            y[one] += routing_weights[one, choice : choice + 1] * apply(x_wide[one], expert)
    if shared is not None:
        y = y + routing_weights[:, -1:] * apply(x_wide, shared)
    return (y if residual is None else widen(residual) + y).astype(x.dtype if residual is None else residual.dtype)
