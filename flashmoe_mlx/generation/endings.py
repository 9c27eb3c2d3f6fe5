"""The completion of a constrained answer in few tokens, for answers that run out of tokens."""

import time
from typing import TYPE_CHECKING

import numpy as np

from flashmoe_mlx.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

_LONGEST = 1024
"""The largest number of tokens of a completion."""
_MOST_SECONDS = 0.25
"""Time of a search, during which no other answer goes on. Ordinary grammars take a hundredth of it."""
_QUOTE, _LETTER = '"', "k"
"""Where both may come next, a string is open: no other value of JSON has a k."""
_PREFERRED = ("}", "]", '"', ",", ":", *"0123456789", "null", "true", "false", *"ntf", "[", "{", "-", *"abcdefghijklm")
"""Texts that end a part of JSON or begin a short part, in the order in which they are tried."""


class Endings:
    """A search for short completions of answers.

    A completion need not be the shortest one: each step takes the tokens that the grammar forces, or else the end of an
    open string, the first allowed token of ``_PREFERRED``, or the first allowed token of the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        encoded = {text: tokenizer.encode(text) for text in (*_PREFERRED, _LETTER)}
        single = {text: ids[0] for text, ids in encoded.items() if len(ids) == 1 and ids[0] < vocab_size}
        self._string = [single[text] for text in (_QUOTE, _LETTER) if text in single]
        self._preferred = [single[text] for text in _PREFERRED if text in single]
        self._words = np.zeros(-(-vocab_size // 32), np.int32)

    def find(self, matcher: "LLMatcher") -> list[int] | None:
        """Return tokens after which the answer of ``matcher`` is complete; None if none are found."""
        matcher, end = matcher.deep_copy(), time.monotonic() + _MOST_SECONDS
        tokens: list[int] = []
        while not (matcher.is_stopped() or matcher.is_accepting()):
            following = matcher.compute_ff_tokens() or self._first(matcher)
            if len(tokens) > _LONGEST or time.monotonic() > end:
                return None
            if not following or not matcher.consume_tokens(following):
                return None
            tokens += following
        return None if matcher.is_error() else tokens

    def _first(self, matcher: "LLMatcher") -> list[int]:
        matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if len(self._string) == 2 and all(map(self._allows, self._string)):
            return self._string[:1]
        for token in self._preferred:
            if self._allows(token):
                return [token]
        return [
            int(token) for token in np.flatnonzero(np.unpackbits(self._words.view(np.uint8), bitorder="little"))[:1]
        ]

    def _allows(self, token: int) -> bool:
        return bool(self._words[token >> 5] >> (token & 31) & 1)
