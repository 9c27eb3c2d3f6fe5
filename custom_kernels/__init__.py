"""The operations whose speed this project is about, each with a plain reference beside it.

One folder an operation: ``reference.py`` in elementary MLX operations is the truth, and whatever else is offered must
equal it. ``choose`` picks once; the record of a run says what was picked.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import attention, expert_mlp, gated_delta

PREFERENCES = ("auto", "reference")


@dataclass(frozen=True, slots=True)
class Kernels:
    """The implementations that a model runs; ``names`` says which, by operation."""

    attention: Callable[[mx.array, mx.array, mx.array], mx.array]
    gated_delta: Callable[
        [mx.array, mx.array, mx.array, mx.array, mx.array, mx.array | None], tuple[mx.array, mx.array]
    ]
    expert_mlp: Callable[[mx.array, expert_mlp.ExpertWeights], mx.array]
    names: Mapping[str, str]


def choose(preference: str) -> Kernels:
    """Implementations: MLX's fused operations ("auto"), or elementary ones ("reference").

    Raises:
        ValueError: another word.
    """
    if preference not in PREFERENCES:
        raise ValueError(f"kernels={preference!r}: choose from {', '.join(PREFERENCES)}")
    if preference == "reference":
        return Kernels(
            attention.reference.attention,
            gated_delta.reference.gated_delta,
            expert_mlp.reference.expert_mlp,
            {"attention": "reference", "gated_delta": "reference", "expert_mlp": "reference"},
        )
    return Kernels(
        attention.attention,
        gated_delta.gated_delta,
        expert_mlp.expert_mlp,
        {
            "attention": "mx.fast.scaled_dot_product_attention",
            "gated_delta": "mx.fast.gated_delta_update",
            "expert_mlp": "mx.quantized_matmul or, of dense records, matmul",
        },
    )
