"""Choose the next token from logits."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import FlashMoeError, InputError


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
        for name in ("temperature", "top_k", "top_p", "min_p"):
            kinds = (int,) if name == "top_k" else (int, float)
            value = getattr(self, name)
            if type(value) not in kinds:
                raise InputError(f"{name}={value!r}: must be a {'whole ' if name == 'top_k' else ''}number")
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
        if seed is not None and (type(seed) is not int or seed < 0):
            raise InputError(f"seed={seed!r}: must be a whole number from 0 on, or null for a different draw each time")
        self._options = options
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token for ``logits`` [vocabulary].

        Raises:
            FlashMoeError: a logit is NaN; no token can be right then.
        """
        if np.isnan(logits).any():
            raise FlashMoeError(
                "the model's logits hold NaN: its weights are damaged (task=pack verify=true), or a kernel"
            )
        if self._options.temperature == 0:
            return int(logits.argmax())
        with np.errstate(over="ignore"):  # under a tiny temperature all but the best may become -inf, which is right
            scaled = (logits.astype(np.float64) - logits.max()) / self._options.temperature
        tokens = self._kept(scaled)
        return int(self._random.choice(tokens, p=_probabilities(scaled[tokens])))

    def _kept(self, scaled: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
        """Tokens that survive the filters; a vocabulary is large, so nothing is sorted without need."""
        options = self._options
        tokens = np.arange(len(scaled))
        if 0 < options.top_k < len(tokens):
            tokens = np.argpartition(-scaled, options.top_k - 1)[: options.top_k]
        if options.top_p < 1:
            tokens = tokens[np.argsort(-scaled[tokens])]
            # The token that crosses the line is kept, so there is always one.
            tokens = tokens[: int(np.searchsorted(np.cumsum(_probabilities(scaled[tokens])), options.top_p)) + 1]
        if options.min_p > 0:
            tokens = tokens[scaled[tokens] >= np.log(options.min_p)]
        return tokens


def _probabilities(scaled: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Softmax of scores of which none is above 0."""
    weights = np.exp(scaled)
    probabilities: npt.NDArray[np.float64] = weights / weights.sum()
    return probabilities
