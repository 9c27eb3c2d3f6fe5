"""The shared expert of a layer."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import ExpertWeights
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.moe.router import Routing


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """The expert that every token uses; ``mlp`` applies its ``weights``."""

    weights: ExpertWeights
    mlp: Callable[[mx.array, ExpertWeights], mx.array]

    def __call__(self, x: mx.array, weight: mx.array) -> mx.array:
        """Compute the output [T, hidden] for ``x`` [T, hidden], times ``weight`` [T, 1]."""
        return weight * self.mlp(x, self.weights)


def begin_shared(shared: SharedExpert | None, x: mx.array, routing: Routing, clock: PhaseClock) -> mx.array | None:
    """Return the output of ``shared`` for ``x``, and let the device compute it while the host fetches experts."""
    if shared is None:
        return None
    y = shared(x, routing.shared_weight)
    clock.begin("experts", y)
    return y
