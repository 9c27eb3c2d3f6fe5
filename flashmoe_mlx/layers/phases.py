"""Wall time of a run by phase."""

import time
from collections import defaultdict
from types import TracebackType
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt


class _Phase:
    """A context that charges its time to a phase; a generator would take Python three times as long."""

    __slots__ = ("_name", "_seconds", "_sign", "_start")

    def __init__(self, seconds: dict[str, float], name: str, sign: int = 1) -> None:
        self._seconds = seconds
        self._name = name
        self._sign = sign

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._seconds[self._name] += self._sign * (time.perf_counter() - self._start)


class PhaseClock:
    """Seconds by phase.

    MLX evaluates lazily, and a layer is evaluated once, when its router's choice is needed. Attention, router and
    experts are then computed together, and their time counts as "compute". With ``split`` each phase is evaluated
    separately, which attributes the time exactly and costs two more synchronizations per layer.
    """

    def __init__(self, split: bool = False) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        """Seconds spent in each phase so far, by the phase's name."""
        self.split = split
        """Whether each phase is evaluated by itself."""
        self.waits: int = 0
        """How often the host waited for the device so far."""

    def phase(self, name: str) -> _Phase:
        """Charge the enclosed time to ``name``."""
        return _Phase(self.seconds, name)

    def instead(self, name: str) -> _Phase:
        """Do not charge the enclosed time, which may be charged to other phases, to the surrounding phase ``name``."""
        return _Phase(self.seconds, name, -1)

    def computing(self, name: str) -> _Phase:
        """Charge the enclosed time to ``name``, or to "compute" if phases are not split.

        Use it around code that may evaluate arrays.
        """
        return _Phase(self.seconds, name if self.split else "compute")

    def evaluate(self, name: str, *arrays: mx.array) -> None:
        """Evaluate ``arrays``, the results of the phase ``name``, and charge the time to it."""
        with self.computing(name):
            self.waits += 1
            mx.eval(*arrays)

    def begin(self, name: str, *arrays: mx.array) -> None:
        """Begin to evaluate ``arrays``, results of the phase ``name``; wait for them only if phases are split."""
        if self.split:
            self.evaluate(name, *arrays)
        else:
            with self.computing(name):
                mx.async_eval(*arrays)  # type: ignore[no-untyped-call]

    def read(self, name: str, array: mx.array, *also: mx.array) -> npt.NDArray[Any]:
        """Begin to evaluate ``array`` and ``also``, results of the phase ``name``, and wait for ``array``.

        ``also`` may still be under way, unless phases are split.
        """
        self.begin(name, array)
        if also:
            self.begin(name, *also)
        with self.computing(name):
            self.waits += not self.split
            mx.eval(array)  # np.array alone would hide an error, such as the loss of another node
            return np.array(array)

    def settle(self, name: str, *arrays: mx.array) -> None:
        """Evaluate ``arrays``, the results of the phase ``name``, if phases are split."""
        if self.split:
            self.evaluate(name, *arrays)
