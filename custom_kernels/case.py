"""A kernel with its inputs, to be compared with MLX's implementation and with the reference in f64."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

Results = tuple[mx.array, ...]

TOLERANCE = {mx.float32: 1e-5, mx.bfloat16: 1e-2}
"""Largest accepted ||kernel - reference|| / ||reference||, with the reference in f64."""


@dataclass(frozen=True)
class Case:
    """One kernel on one set of inputs; every call of a function computes its results again.

    Attributes:
        operation: name of the operation.
        title: the inputs in words.
        dtype: type of activations.
        nbytes: the minimum number of bytes that the kernel reads and writes.
        custom: run the kernel, which may write in place into arrays that no other function reads.
        standard: run MLX's implementation.
        reference: run the reference in f64.
    """

    operation: str
    title: str
    dtype: mx.Dtype
    nbytes: int
    custom: Callable[[], Results]
    standard: Callable[[], Results]
    reference: Callable[[], Results]

    def error(self) -> float:
        """Return the largest ||custom - reference|| / ||reference|| of all results; infinity if a value is NaN."""
        found = self.custom()
        mx.eval(found)
        with mx.stream(mx.cpu):
            expected = self.reference()
            mx.eval(expected)
        return max(relative_error(ours, exact) for ours, exact in zip(found, expected, strict=True))


def relative_error(found: mx.array, expected: mx.array) -> float:
    """Return ||found - expected|| / ||expected||; infinity if shapes differ, or if a value is NaN or infinite."""
    if found.shape != expected.shape:
        return float("inf")
    ours, exact = np.array(found.astype(mx.float32)).astype(np.float64), np.array(expected)
    if not np.isfinite(ours).all():
        return float("inf")
    difference, size = (float(np.linalg.norm(values)) for values in (ours - exact, exact))
    return difference / max(size, 1e-300)
