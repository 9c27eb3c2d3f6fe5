"""The routed experts of a few tokens, and the shared one, in elementary operations."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.expert_mlp.reference import ExpertWeights, expert_mlp
from flashmoe_mlx.custom_kernels.precision import wide
from flashmoe_mlx.custom_kernels.routed_experts.format import ExpertFormat


def routed_experts(
    x: mx.array,
    slab: mx.array,
    rows: mx.array,
    shares: mx.array,
    form: ExpertFormat,
    shared: ExpertWeights | None = None,
    apply: Callable[[mx.array, ExpertWeights], mx.array] = expert_mlp,
) -> mx.array:
    """y[t] = sum over k of shares[t, k] * expert[rows[t, k]](x[t]), plus shares[t, K] * shared(x[t]).

    Args:
        x: [T, hidden].
        slab: uint8 [rows, record bytes].
        rows: int32 [T, K], the row of ``slab`` that holds each expert; -1 for one that adds nothing.
        shares: f32 [T, K], or [T, K + 1] with ``shared``, whose share comes last.
        form: how the experts lie in their records.
        shared: an expert that every token uses.
        apply: an implementation of ``expert_mlp``.

    Returns:
        [T, hidden] in the type of ``x``; the sums are in f32.
    """
    x_wide = wide(x)
    y = mx.zeros(x.shape, x_wide.dtype)
    for (token, choice), row in np.ndenumerate(np.array(rows)):
        if row >= 0:
            expert = form.expert(slab[row : row + 1].reshape(-1))
            y[token] += shares[token, choice] * apply(x_wide[token : token + 1], expert)[0]
    if shared is not None:
        y = y + shares[:, -1:] * apply(x_wide, shared)
    return y.astype(x.dtype)
