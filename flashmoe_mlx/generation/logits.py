"""Check the model's logits, and change them with processors before a token is chosen."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import FlashMoeError

_EXCLUDES = -100.0
"""The bias that excludes a token."""
_LARGEST = np.finfo(np.float64).max
Logits = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]


def checked_logits(logits: Logits) -> Logits:
    """Return ``logits`` [..., vocabulary] if a token can be chosen from them.

    -inf is allowed and excludes a token, as long as another token remains.

    Raises:
        FlashMoeError: a value is NaN or +inf, or all values of a row are -inf; code "bad_logits".
    """
    # A maximum propagates NaN, so a single pass finds NaN, +inf, and rows of -inf.
    highest = logits.max(axis=-1)
    if np.isfinite(highest).all():
        return logits
    if np.isnan(highest).any():
        found = "hold NaN"
    else:
        found = "hold +inf" if np.isposinf(highest).any() else "make every token impossible (all are -inf)"
    raise FlashMoeError(
        f"the model's logits {found}: its weights are damaged (task=pack verify=true checks a pack), or a kernel is "
        "wrong (task=doctor checks them; kernels=reference avoids them)",
        code="bad_logits",
    )


class TokenHistory:
    """The tokens of a sequence, counted by id."""

    def __init__(self, prompt: Sequence[int], vocab_size: int) -> None:
        self.seen: npt.NDArray[np.bool_] = np.zeros(vocab_size, bool)
        """Whether each token is in the prompt or was generated."""
        self.seen[list(prompt)] = True
        self.generated: npt.NDArray[np.int64] = np.zeros(vocab_size, np.int64)
        """How often each token was generated."""
        self.count: int = 0
        """The number of generated tokens."""

    def add(self, token_id: int) -> None:
        """Count a generated token."""
        self.seen[token_id] = True
        self.generated[token_id] += 1
        self.count += 1

    def replace(self, latest: int, token_id: int) -> None:
        """Count ``token_id`` in place of the ``latest`` generated token, which stays seen."""
        self.generated[latest] -= 1
        self.count -= 1
        self.add(token_id)


LogitsProcessor = Callable[[Scores, TokenHistory], Scores]
"""Returns changed logits f64 [vocabulary]; must not write into its argument."""


class Bias:
    """A processor that adds numbers to the logits of tokens; the least one, -100, excludes a token.

    Source: the OpenAI API, ``logit_bias``.

    Args:
        biases: a number from -100 to 100 for each token id.
    """

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._ids = np.array(list(biases), np.int64)
        values = np.array(list(biases.values()), np.float64)
        self._values = np.where(values <= _EXCLUDES, -np.inf, values)

    def __call__(self, logits: Scores, history: TokenHistory) -> Scores:  # noqa: ARG002  # a processor's signature
        """Return the logits with their biases."""
        changed = logits.copy()
        changed[self._ids] += self._values
        return changed


class Exclusion:
    """A processor that excludes the tokens ``ids`` until ``count`` tokens were generated; None for ever."""

    def __init__(self, ids: Iterable[int], count: int | None = None) -> None:
        self._ids = list(ids)
        self._count = count

    def __call__(self, logits: Scores, history: TokenHistory) -> Scores:
        """Return the logits without the excluded tokens."""
        if self._count is not None and history.count >= self._count:
            return logits
        changed = logits.copy()
        changed[[token for token in self._ids if token < len(logits)]] = -np.inf
        return changed


class RepetitionPenalty:
    """A processor that makes tokens of the prompt and the answer less likely, or more likely if ``penalty`` is below 1.

    Positive logits are divided by ``penalty``, all other logits multiplied. Source: transformers
    ``RepetitionPenaltyLogitsProcessor``; CTRL, https://arxiv.org/abs/1909.05858, section 4.1.
    """

    def __init__(self, penalty: float) -> None:
        self._penalty = penalty

    def __call__(self, logits: Scores, history: TokenHistory) -> Scores:
        """Return the penalized logits."""
        changed = logits.copy()
        seen = logits[history.seen]
        with np.errstate(over="ignore"):
            penalized = np.where(seen > 0, seen / self._penalty, seen * self._penalty)
        # A possible token stays possible, and no score becomes infinite.
        changed[history.seen] = np.where(np.isfinite(seen), np.clip(penalized, -_LARGEST, _LARGEST), seen)
        return changed


class CountPenalty:
    """A processor that subtracts ``presence`` once, and ``frequency`` per occurrence, from tokens of the answer.

    Tokens of the prompt do not count. Source: the OpenAI API, and vLLM ``apply_penalties``.
    """

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence = presence
        self._frequency = frequency

    def __call__(self, logits: Scores, history: TokenHistory) -> Scores:
        """Return the penalized logits."""
        changed: Scores = logits - self._frequency * history.generated - self._presence * (history.generated > 0)
        return changed
