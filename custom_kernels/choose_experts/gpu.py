"""The kernel that chooses experts on GPUs, in one dispatch: one simdgroup per token."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.checks import CodePath, Sample, tokens_phrase
from flashmoe_mlx.custom_kernels.kernel import Kernel
from flashmoe_mlx.custom_kernels.shapes import ModelShapes

_OUTPUTS = ["chosen", "places", "weights"]
BODY = Kernel(__package__, "body", ["scores", "table"], _OUTPUTS, ["functions"], {"WITH_EARLIER": False})
LISTING = Kernel(__package__, "body", ["scores", "table", "earlier"], _OUTPUTS, ["functions"], {"WITH_EARLIER": True})
_MOST_EXPERTS = 1024
"""Each lane keeps the scores of every 32nd expert in registers."""
_MOST_CHOSEN = 32


def code_path(
    scores: mx.array, table: mx.array, k: int, shared: bool = True, renormalized: bool = True
) -> CodePath | None:
    """Return the code path of ``choose_experts``; None if it does not support the arguments."""
    supported = (
        scores.dtype in (mx.float32, mx.bfloat16)
        and 8 <= len(table) <= _MOST_EXPERTS
        and k <= min(_MOST_CHOSEN, len(table))
        and scores.shape[1] >= len(table) + shared
    )
    if not supported:
        return None
    return (
        tokens_phrase(len(scores)),
        f"K={k}",
        "" if shared else "without a shared expert",
        "" if renormalized else "not renormalized",
    )


def choose_experts(
    scores: mx.array, table: mx.array, k: int, shared: bool = True, renormalized: bool = True
) -> tuple[mx.array, mx.array, mx.array]:
    """Compute ``reference.choose_experts`` for arguments with a ``code_path``."""
    return _run(BODY, [scores, table], (len(scores), k), k, shared, renormalized)


def list_experts(
    scores: mx.array, table: mx.array, k: int, earlier: mx.array, shared: bool = True, renormalized: bool = True
) -> tuple[mx.array, mx.array, mx.array]:
    """Compute ``choose_experts``, with the chosen experts at the end of a list: ``earlier`` int32 [n], then theirs."""
    return _run(LISTING, [scores, table, earlier], (earlier.size + len(scores) * k,), k, shared, renormalized)


def _run(
    kernel: Kernel, inputs: list[mx.array], shape: tuple[int, ...], k: int, shared: bool, renormalized: bool
) -> tuple[mx.array, mx.array, mx.array]:
    scores, table = inputs[:2]
    tokens, width = scores.shape
    chosen, places, weights = kernel(
        inputs,
        [(shape, mx.int32), ((tokens, k), mx.int32), ((tokens, k + shared), mx.float32)],
        (tokens, 1, 1),
        32,
        {
            "T": scores.dtype,
            "EXPERTS": len(table),
            "WIDTH": width,
            "CHOSEN": k,
            "SHARED_EXPERT": int(shared),
            "RENORMALIZED": int(renormalized),
        },
    )
    return chosen, places, weights


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield one token and several tokens with different scores."""
    table = mx.array(np.random.default_rng(0).permutation(model.num_experts), mx.int32)
    for tokens in (1, 5):
        scores = different_scores(tokens, model.num_experts, model.dtype)
        arguments = (scores, table, model.experts_k, bool(model.shared), model.renormalized)
        if code_path(*arguments) is not None:
            yield Sample(arguments)


def different_scores(tokens: int, experts: int, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    """Return scores [tokens, experts + 16] that are exact in bf16; no two experts of a token have equal scores."""
    random = np.random.default_rng(seed)
    ranks = np.stack([random.permutation(experts) for _ in range(tokens)])
    scores = mx.array((0x3E80 + ranks).astype(np.uint16)).view(mx.bfloat16)  # consecutive numbers, from 1/4 on
    rest = mx.array(random.standard_normal((tokens, 16)).astype(np.float32)).astype(mx.bfloat16)
    return mx.concatenate([scores, rest], axis=-1).astype(dtype)
