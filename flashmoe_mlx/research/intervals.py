"""Percentiles, and confidence intervals of medians, shares and ratios."""

import math
from collections.abc import Sequence

import numpy as np

LEAST_ROUNDS = 3
_RESAMPLES = 10_000


def percentiles(values: Sequence[float], ranks: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return the percentiles of ``values`` at three ``ranks`` (0 to 100), interpolated linearly."""
    low, middle, high = np.percentile(values, ranks).tolist()
    return low, middle, high


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % percentile-bootstrap interval of the median of ``values``; None for fewer than 3 values.

    The random seed is fixed, so the result is repeatable. Source: Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13.
    """
    if len(values) < LEAST_ROUNDS:
        return None
    picks = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(np.asarray(values)[picks], axis=1), (2.5, 97.5))
    return float(low), float(high)


def share_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of the share ``successes / trials`` in independent trials.

    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22, 1927.

    Raises:
        ValueError: there are no trials, or ``successes`` is not between 0 and ``trials``.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials}")
    z = 1.959964
    share = successes / trials
    center = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % percentile-bootstrap interval of a ratio of sums over items; None for fewer than 3 items.

    Each item, such as a text, contributes one numerator and one denominator. Items are resampled rather than their
    tokens, because the tokens of a text are not independent. The random seed is fixed, so the result is repeatable.
    """
    if len(numerators) < LEAST_ROUNDS:
        return None
    picks = np.random.default_rng(0).integers(len(numerators), size=(_RESAMPLES, len(numerators)))
    ratios = np.asarray(numerators, float)[picks].sum(1) / np.asarray(denominators, float)[picks].sum(1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)


def format_interval(interval: tuple[float, float] | None) -> str:
    """Return " [low, high]", to follow a value in a table; an empty string for None."""
    return "" if interval is None else f" [{interval[0]:.3g}, {interval[1]:.3g}]"
