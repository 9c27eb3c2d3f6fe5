"""Log probabilities of generated tokens."""

from dataclasses import dataclass

import numpy as np

from flashmoe_mlx.generation.logits import Logits


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A generated token and its natural log probability, with those of the likeliest tokens.

    The probabilities are the model's, before penalties, temperature and filters.

    Attributes:
        token_id: the generated token.
        logprob: its log probability; -inf for a token that the model excludes.
        top: the likeliest tokens with their log probabilities, in descending order, ties by ascending id.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


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
