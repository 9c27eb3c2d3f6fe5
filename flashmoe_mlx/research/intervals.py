"""How sure a median is."""

from collections.abc import Sequence

import numpy as np

LEAST_ROUNDS = 3
_RESAMPLES = 10_000


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % percentile-bootstrap interval of the median of ``values``; None of fewer than 3.

    Repeatable: the resamples are always the same. Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapter 13.
    """
    if len(values) < LEAST_ROUNDS:
        return None
    picks = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(np.asarray(values)[picks], axis=1), (2.5, 97.5))
    return float(low), float(high)
