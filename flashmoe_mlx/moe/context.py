"""The context of a forward pass."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.moe.in_memory import UsedExperts
from flashmoe_mlx.moe.prefetch import Prefetcher

RoutingObserver = Callable[[int, npt.NDArray[np.uint32]], None]
"""Receives each layer's index and the experts [T, K] that its router chose, ascending for each token."""


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Clock, prefetcher and callbacks of one forward pass, shared by all layers.

    Attributes:
        clock: measures the phases of the pass.
        prefetcher: hints experts to the store; its ``begin_pass`` was called for this pass.
        observer: receives the routing of each layer.
        reached: receives the number of layers that are done, before each layer and, with fractions, inside a layer with
            many tokens; may raise an error to end the pass.
        used: collects the experts of layers that need not wait for the choice of their router; None if every layer has
            to wait, because the prefetcher, the observer or the clock needs the choice at once.
    """

    clock: PhaseClock
    prefetcher: Prefetcher | None = None
    observer: RoutingObserver | None = None
    reached: Callable[[float], None] | None = None
    used: UsedExperts | None = None

    def reach(self, layers: float) -> None:
        """Report that ``layers`` layers are done."""
        if self.reached is not None:
            self.reached(layers)
