"""Where the time of a run goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


class PhaseClock:
    """Seconds by phase.

    MLX evaluates lazily, and a layer is evaluated once, when its router's choice is needed; attention, router and
    experts cannot be told apart then and are counted as "compute". With ``split`` each is evaluated by itself, which
    attributes the time exactly and costs two more synchronisations a layer.
    """

    def __init__(self, split: bool = False) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._split = split

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    @contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Count the time inside as computing in the phase ``name``: for what may evaluate arrays itself."""
        with self.phase(name if self._split else "compute"):
            yield

    def evaluate(self, name: str, *arrays: mx.array) -> None:
        """Evaluate ``arrays``, the end of the phase ``name``."""
        with self.computing(name):
            mx.eval(*arrays)

    def settle(self, name: str, *arrays: mx.array) -> None:
        """If phases are split, evaluate ``arrays``, the end of the phase ``name``."""
        if self._split:
            self.evaluate(name, *arrays)
