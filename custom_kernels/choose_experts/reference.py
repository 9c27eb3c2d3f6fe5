"""The choice of experts for a few tokens, in elementary operations."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.precision import widen


def choose_experts(scores: mx.array, table: mx.array, k: int) -> tuple[mx.array, mx.array, mx.array]:
    """Choose the ``k`` experts with the highest scores; of equal scores, the first.

    Args:
        scores: [T, at least experts + 1], the scores of all experts, then the shared expert's logit; more is ignored.
        table: int32 [experts], a number for each expert, such as its row in a slab.
        k: experts for each token.

    Returns:
        The experts of each token in ascending order, int32 [T, k]; their numbers in ``table``, int32 [T, k]; and
        weights f32 [T, k + 1]: the softmax over the chosen scores, then the sigmoid of the shared expert's logit.
    """
    experts = len(table)
    routed, shared = widen(scores[:, :experts]), widen(scores[:, experts : experts + 1])
    chosen = mx.sort(mx.argsort(-routed, axis=-1)[:, :k], axis=-1).astype(mx.int32)
    # Sums with one term rather than an index, for which MLX compiles a module on CUDA.
    is_chosen = chosen[..., None] == mx.arange(experts)
    weights = mx.softmax(mx.where(is_chosen, routed[:, None], 0).sum(axis=-1), axis=-1)
    places = mx.where(is_chosen, table, 0).sum(axis=-1)
    return chosen, places, mx.concatenate([weights, mx.sigmoid(shared)], axis=-1)
