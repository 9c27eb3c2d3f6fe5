"""The shared expert of a layer."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import ExpertWeights
from flashmoe_mlx.layers.phases import PhaseClock


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """The expert that every token uses; ``mlp`` applies its ``weights``."""

    weights: ExpertWeights
    mlp: Callable[[mx.array, ExpertWeights], mx.array]

    def __call__(self, x: mx.array, weight: mx.array) -> mx.array:
        """Compute the output [T, hidden] for ``x`` [T, hidden], times ``weight`` [T, 1]."""
        return weight * self.mlp(x, self.weights)

    def begin(self, x: mx.array, weight: mx.array, clock: PhaseClock) -> mx.array:
        """Return the output for ``x``, and let the device compute it while the host fetches experts."""
        y = self(x, weight)
        clock.begin("experts", y)
        return y
