"""Predictors of routing, which let a simulated cache prefetch experts."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from flashmoe_mlx.errors import InputError

__all__ = ["FixedAccuracyPredictor", "Predictor", "PreviousTokenPredictor"]


class Predictor(Protocol):
    """A source of guesses at the experts of a layer before its router has chosen them."""

    def guess(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Return distinct experts to prefetch in ``layer``, before its router requests ``experts``."""
        ...


class PreviousTokenPredictor:
    """A predictor that repeats the choice of the previous token in the same layer."""

    def __init__(self) -> None:
        self._last: dict[int, list[int]] = {}

    def guess(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Return the experts of the previous token; an empty list for the first token."""
        previous = self._last.get(layer, [])
        self._last[layer] = list(experts)
        return previous


class FixedAccuracyPredictor:
    """A predictor whose guesses are correct with probability ``accuracy``.

    It makes as many guesses as the request has experts; an incorrect guess is a random expert outside the request. It
    stands in for predictors that need the model, such as the next layer's router on this layer's residual.

    Raises:
        InputError: ``accuracy`` is not between 0 and 1 (code "out_of_range").
    """

    def __init__(self, accuracy: float, num_experts: int, seed: int = 0) -> None:
        if not 0 <= accuracy <= 1:
            raise InputError(f"accuracy={accuracy}: must be from 0 to 1", code="out_of_range")
        self._accuracy = accuracy
        self._num_experts = num_experts
        self._random = np.random.default_rng(seed)

    def guess(self, layer: int, experts: Sequence[int]) -> list[int]:  # noqa: ARG002  # the protocol has it
        """Return the correct guesses, followed by the incorrect guesses."""
        correct = self._random.random(len(experts)) < self._accuracy
        guesses = [expert for expert, is_correct in zip(experts, correct, strict=True) if is_correct]
        absent = np.setdiff1d(np.arange(self._num_experts), experts)
        count = min(len(experts) - len(guesses), len(absent))
        wrong: list[int] = self._random.choice(absent, count, replace=False).tolist()
        return guesses + wrong
