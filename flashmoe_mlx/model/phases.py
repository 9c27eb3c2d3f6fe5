"""Where the time of a run goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


class PhaseClock:
    """Seconds by phase.

    MLX evaluates lazily, and a layer is evaluated once, when its router's choice is needed: "router_wait" then holds
    the attention, the router and the experts of the layer before. With ``split`` every phase is evaluated by itself,
    which attributes the time exactly and costs two more synchronisations a layer.
    """

    def __init__(self, split: bool = False) -> None:
        self.split = split
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def settle(self, name: str, *arrays: mx.array) -> None:
        """If phases are split, evaluate ``arrays`` now and count that as ``name``."""
        if self.split:
            with self.phase(name):
                mx.eval(*arrays)
