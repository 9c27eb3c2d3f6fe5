"""The shared expert of a layer."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import ExpertWeights


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """The expert that every token uses; ``mlp`` applies its ``weights``."""

    weights: ExpertWeights
    mlp: Callable[[mx.array, ExpertWeights], mx.array]

    def __call__(self, x: mx.array, weight: mx.array) -> mx.array:
        """Compute the output [T, hidden] for ``x`` [T, hidden], times ``weight`` [T, 1]."""
        return weight * self.mlp(x, self.weights)
