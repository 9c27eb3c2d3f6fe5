"""Confidence intervals of medians, shares and ratios."""

import math
from collections.abc import Sequence

import numpy as np

LEAST_ROUNDS = 3
_RESAMPLES = 10_000


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % percentile-bootstrap interval of the median of ``values``; None for fewer than 3 values.

    The resamples are always the same, so the result is repeatable. Source: Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13.
    """
    if len(values) < LEAST_ROUNDS:
        return None
    picks = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(np.asarray(values)[picks], axis=1), (2.5, 97.5))
    return float(low), float(high)


def share_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share in ``trials`` independent trials.

    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22, 1927.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials}")
    z = 1.959964
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % percentile-bootstrap interval of sum / sum over whole items; None for fewer than 3 items.

    Tokens of one text are not independent, so whole texts are resampled, never tokens. Repeatable, like
    ``median_interval``.
    """
    if len(numerators) < LEAST_ROUNDS:
        return None
    picks = np.random.default_rng(0).integers(len(numerators), size=(_RESAMPLES, len(numerators)))
    ratios = np.asarray(numerators, float)[picks].sum(1) / np.asarray(denominators, float)[picks].sum(1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)
