"""Log probabilities of tokens of the prompt and the answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flashmoe_mlx.generation.logits import Logits, checked_logits

_ROWS = 64
"""The number of tokens of a prompt whose logits are in memory together."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token and its natural log probability, with those of the likeliest tokens.

    The probabilities are the model's, before penalties, temperature and filters.

    Attributes:
        token_id: the token.
        logprob: its log probability; -inf for a token that the model excludes.
        top: the likeliest tokens with their log probabilities, in descending order, ties by ascending id.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def add_prompt_logprobs(
    found: list[TokenLogprobs],
    following: Sequence[int],
    count: int,
    hidden: mx.array,
    logits_of: Callable[[mx.array], mx.array],
) -> None:
    """Append the log probabilities of tokens of a prompt to ``found``.

    Logits are computed for a few tokens at a time, because those of a whole chunk take a gigabyte for a large
    vocabulary.

    Args:
        found: the log probabilities so far.
        following: the token after each row of ``hidden``; the last row may have none.
        count: the number of alternatives.
        hidden: the hidden states [T, hidden].
        logits_of: computes logits [T, vocabulary].
    """
    for start in range(0, len(following), _ROWS):
        tokens = following[start : start + _ROWS]
        logits = checked_logits(np.array(logits_of(hidden[start : start + len(tokens)])))
        found += [token_logprobs(row, token, count) for row, token in zip(logits, tokens, strict=True)]


def token_logprobs(logits: Logits, token_id: int, count: int) -> TokenLogprobs:
    """Compute the log probabilities of ``token_id`` and of the ``count`` likeliest tokens, from ``logits`` [vocab]."""
    scores = logits.astype(np.float64)
    highest = scores.max()
    logprobs = scores - (highest + np.log(np.exp(scores - highest).sum()))
    count = min(count, len(logprobs))
    top: list[int] = []
    if count:
        least = np.partition(logprobs, -count)[-count]
        likely = np.flatnonzero(logprobs >= least)  # all tokens that tie with the last one, so that ids break the tie
        top = likely[np.argsort(-logprobs[likely], kind="stable")][:count].tolist()
    return TokenLogprobs(token_id, float(logprobs[token_id]), tuple((token, float(logprobs[token])) for token in top))
