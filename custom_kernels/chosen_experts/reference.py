"""The experts that the scores of a few tokens choose, in elementary operations."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from flashmoe_mlx.custom_kernels.choose_experts.reference import choose_experts
from flashmoe_mlx.custom_kernels.expert_format import ExpertFormat
from flashmoe_mlx.custom_kernels.routed_experts import mlx, reference
from flashmoe_mlx.custom_kernels.weights import ExpertWeights


def chosen_experts(
    x: mx.array,
    residual: mx.array,
    slab: mx.array,
    scores: mx.array,
    table: mx.array,
    earlier: mx.array,
    k: int,
    form: ExpertFormat,
    shared: ExpertWeights | None,
    renormalized: bool = True,
    apply: Callable[..., mx.array] = reference.routed_experts,
) -> tuple[mx.array, mx.array]:
    """Choose experts and add them, with a shared expert, to a residual.

    Args:
        x: normalized hidden states [T, hidden].
        residual: [T, hidden] in the type of ``x`` or in f32.
        slab: records of all experts, uint8 [experts, record_bytes].
        scores: see ``choose_experts``.
        table: int32 [experts], the row of ``slab`` of each expert.
        earlier: int32 [n], the experts of earlier layers.
        k: experts for each token.
        form: format of the records.
        shared: the shared expert, or None.
        renormalized: see ``choose_experts``.
        apply: an implementation of ``routed_experts``.

    Returns:
        [T, hidden] in the type of ``residual``; and ``earlier`` followed by the chosen experts, int32 [n + T * k].
    """
    chosen, rows, weights = choose_experts(scores, table, k, shared is not None, renormalized)
    y = apply(x, slab, rows, weights, form, shared, residual)
    return y, mx.concatenate([earlier, chosen.reshape(-1)])


by_mlx: partial[tuple[mx.array, mx.array]] = partial(chosen_experts, apply=mlx.routed_experts)
"""``chosen_experts`` with each expert by MLX's quantized products."""
