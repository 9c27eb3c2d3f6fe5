"""A custom kernel is compared with its reference when it is first used, and replaced if it fails."""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

import mlx.core as mx
import numpy as np

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R", mx.array, tuple[mx.array, mx.array, mx.array], tuple[mx.array, ...])

TOLERANCE = {mx.float32: 2e-3, mx.bfloat16: 5e-2}
"""Largest difference, relative to the largest value, between a kernel and its reference in the same types.

Wide enough for CUDA's TF32 products and for bf16 between the reference's operations; a wrong kernel is far outside.
"""


@dataclass
class CheckedKernel(Generic[P, R]):
    """``custom`` where it takes the arguments and agrees with ``reference``, else ``standard``.

    ``takes`` says whether ``custom`` is made for the arguments, and ``kind`` (both with the same arguments) which of
    several code paths they lead to: each is checked once. ``report`` hears what became of every kind. ``sample``, if
    given, makes of the arguments those of the check: fewer, and copies of what the kernel would write to. ``maker``
    says what kind of kernel it is.
    """

    name: str
    custom: Callable[P, R]
    standard: Callable[P, R]
    reference: Callable[P, R]
    takes: Callable[P, bool]
    kind: Callable[P, Hashable]
    report: Callable[[str], None]
    sample: Callable[P, tuple[Any, ...]] | None = None
    maker: str = "custom kernel"
    _verdicts: dict[Hashable, bool] = field(default_factory=dict)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """What the chosen implementation returns."""
        if not self.takes(*args, **kwargs):
            return self.standard(*args, **kwargs)
        kind = self.kind(*args, **kwargs)
        if kind not in self._verdicts:
            self._verdicts[kind] = self._check(*args, **kwargs)
        chosen = self.custom if self._verdicts[kind] else self.standard
        return chosen(*args, **kwargs)

    def _check(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        if self.sample is not None:
            return self._agrees(*self.sample(*args, **kwargs))
        return self._agrees(*args, **kwargs)

    def _agrees(self, *args: Any, **kwargs: Any) -> bool:
        expected = _arrays(self.reference(*args, **kwargs))
        mx.eval(expected)
        try:
            got = _arrays(self.custom(*args, **kwargs))
            mx.eval(got)
        except (RuntimeError, ValueError) as error:
            return self._replaced(f"cannot run: {str(error).splitlines()[0]}")
        # A state in f32 that comes out of inputs in bf16 is no more exact than they are.
        accepted = max(TOLERANCE[array.dtype] for array in got)
        for ours, theirs in zip(got, expected, strict=True):
            difference = relative_difference(ours, theirs)
            if not difference <= accepted:  # not a number fails as well
                return self._replaced(f"differs from its reference by {difference:.1e} of the largest value")
        self.report(f"{self.maker} {self.name}")
        return True

    def _replaced(self, why: str) -> bool:
        _log.warning("the %s %s %s; MLX's own operations run in its place", self.maker, self.name, why)
        self.report(f"MLX: the {self.maker} {self.name} {why}")
        return False


def relative_difference(got: mx.array, expected: mx.array) -> float:
    """Max |got - expected| / max |expected|; not a number if any value is none."""
    wide = expected.astype(mx.float32)
    difference = mx.abs(got.astype(mx.float32) - wide).max() / mx.maximum(mx.abs(wide).max(), 1e-30)
    return float(np.array(difference))


def _arrays(result: mx.array | tuple[mx.array, ...]) -> list[mx.array]:
    return [result] if isinstance(result, mx.array) else list(result)
