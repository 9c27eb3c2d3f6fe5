"""The choice of experts for a few tokens, in elementary operations."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.precision import widen


def choose_experts(
    scores: mx.array, table: mx.array, k: int, shared: bool = True, renormalized: bool = True
) -> tuple[mx.array, mx.array, mx.array]:
    """Choose the ``k`` experts with the highest scores; of equal scores, the first.

    Args:
        scores: [T, at least experts + shared], the scores of all experts, then the logit of a shared expert; more is
            ignored.
        table: int32 [experts], a number for each expert, such as its row in a slab.
        k: experts for each token.
        shared: whether there is a shared expert.
        renormalized: whether the weights of a token's chosen experts sum to 1.

    Returns:
        The experts of each token in ascending order, int32 [T, k]; their numbers in ``table``, int32 [T, k]; and
        weights f32 [T, k + shared]: the softmax over the chosen scores, or over all if not ``renormalized``, then the
        sigmoid of the shared expert's logit.
    """
    experts = len(table)
    routed = widen(scores[:, :experts])
    chosen = mx.sort(mx.argsort(-routed, axis=-1)[:, :k], axis=-1).astype(mx.int32)
    # Sums with one term rather than an index, for which MLX compiles a module on CUDA.
    is_chosen = chosen[..., None] == mx.arange(experts)
    logits = mx.where(is_chosen, routed[:, None], 0).sum(axis=-1)
    if renormalized:
        weights = mx.softmax(logits, axis=-1)
    else:
        weights = mx.exp(logits - mx.logsumexp(routed, axis=-1, keepdims=True))
    places = mx.where(is_chosen, table, 0).sum(axis=-1)
    if shared:
        weights = mx.concatenate([weights, mx.sigmoid(widen(scores[:, experts : experts + 1]))], axis=-1)
    return chosen, places, weights
