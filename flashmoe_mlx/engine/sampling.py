"""Choose the next token from logits."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import InputError


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How to choose; each filter works on what the one before has left, in this order, as in transformers.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature}: must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k}: must be 0 (off) or the number of tokens to choose from")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: must be above 0 and at most 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p={self.min_p}: must be from 0 (off) to 1")


class Sampler:
    """Draws tokens; equal seeds and logits give equal tokens."""

    def __init__(self, options: SamplingOptions, seed: int | None = None) -> None:
        if seed is not None and seed < 0:
            raise InputError(f"seed={seed}: must be 0 or above, or null for a different draw each time")
        self._options = options
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token for ``logits`` [vocabulary].

        Raises:
            FloatingPointError: a logit is NaN; no token can be right then.
        """
        if np.isnan(logits).any():
            raise FloatingPointError("the model's logits hold NaN")
        if self._options.temperature == 0:
            return int(logits.argmax())
        kept = self._kept(logits.astype(np.float64) / self._options.temperature)
        tokens, probabilities = kept
        return int(self._random.choice(tokens, p=probabilities))

    def _kept(self, scaled: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """Tokens that survive the filters, most probable first, and their probabilities."""
        options = self._options
        tokens = np.argsort(-scaled, kind="stable")
        if options.top_k:
            tokens = tokens[: options.top_k]
        probabilities = _softmax(scaled[tokens])
        if options.top_p < 1:
            # The token that crosses the line is kept, so there is always one.
            count = int(np.searchsorted(np.cumsum(probabilities), options.top_p)) + 1
            tokens, probabilities = tokens[:count], _normalised(probabilities[:count])
        if options.min_p > 0:
            keep = probabilities >= options.min_p * probabilities[0]
            tokens, probabilities = tokens[keep], _normalised(probabilities[keep])
        return tokens, probabilities


def _softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return _normalised(np.exp(scores - scores.max()))


def _normalised(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    normalised: npt.NDArray[np.float64] = weights / weights.sum()
    return normalised
