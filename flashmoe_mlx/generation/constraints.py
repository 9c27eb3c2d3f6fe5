"""Constraints of answers to a grammar: masks for the choice of each token, and tokens that the grammar forces.

A constraint begins where the answer does: after the model's thinking, or at the beginning of each tool call that the
model chooses to make. Masks are computed on the host while nothing else needs them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.generation.endings import Endings
from flashmoe_mlx.text.reasoning import ReasoningSplitter, thinking_is_closed
from flashmoe_mlx.text.tags import THINK, TOOL_CALL
from flashmoe_mlx.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

Allowed = npt.NDArray[np.bool_]
_NEAR = 64
"""Tokens left of an answer, besides twice its shortest form, below which its completion is planned."""
_MOST_NEWLINES = 2
"""Newlines that may follow the model's thinking before the answer begins, as the published templates write them."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """A compiled grammar, with which any number of answers begin.

    Attributes:
        matcher: the grammar before its first token.
        tokenizer: the model's tokenizer.
        vocab_size: the number of logits.
        endings: finds completions of answers with few tokens left.
        may_think: whether the model may think first although the prompt does not open thinking.
        splits: whether thinking is separated from the answer; if not, the grammar begins at once.
        each_call: whether the grammar describes a tool call after ``<tool_call>``, and the rest of the answer is free.
        one_call: whether an answer ends after the first call.
    """

    matcher: "LLMatcher"
    tokenizer: Tokenizer
    vocab_size: int
    endings: Endings
    may_think: bool = False
    splits: bool = True
    each_call: bool = False
    one_call: bool = False

    def begin(self, prompt_ids: Sequence[int], stop_ids: Collection[int]) -> "ConstrainedAnswer":
        """Return the state of an answer to ``prompt_ids``, which ``stop_ids`` end."""
        return ConstrainedAnswer(self, prompt_ids, stop_ids)


class _Phase(Enum):
    """The rules for the next token: none in FREE, and in THINKING all tokens but the end of the answer."""

    THINKING = auto()
    FREE = auto()
    GRAMMAR = auto()
    COMPLETE = auto()


class ConstrainedAnswer:
    """The state of one answer under a constraint.

    Attributes:
        shortened: whether the answer was completed because few tokens were left.
    """

    def __init__(self, constraint: Constraint, prompt_ids: Sequence[int], stop_ids: Collection[int]) -> None:
        self._constraint = constraint
        tokenizer = constraint.tokenizer
        self._matcher = constraint.matcher.deep_copy()
        self._words = np.zeros(-(-constraint.vocab_size // 32), np.int32)
        self._stop_ids = [token for token in stop_ids if token < constraint.vocab_size]
        self._detokenizer = tokenizer.detokenizer()
        self._splitter = ReasoningSplitter(tokenizer, prompt_ids)
        self._think_id: int | None = None
        """The token that may begin thinking instead of the answer, as the first token."""
        self.shortened: bool = False
        self._ending: list[int] | None = None
        """Tokens that complete the answer; None while they are unknown."""
        self._near: int | None = None
        """The number of tokens left below which ``_ending`` is kept; None before it is known."""
        self._newlines = 0
        """The number of newlines that may precede the answer."""
        self._newline_ids = {
            ids[0]: count for count in range(1, _MOST_NEWLINES + 1) if len(ids := tokenizer.encode("\n" * count)) == 1
        }
        if constraint.each_call:
            self._phase = _Phase.FREE
        elif constraint.splits and self._splitter.open:
            self._phase = _Phase.THINKING
        else:
            self._phase = _Phase.GRAMMAR
            if constraint.splits and constraint.may_think and not thinking_is_closed(tokenizer, prompt_ids):
                self._think_id = tokenizer.added_tokens.get(THINK)

    @property
    def restricts(self) -> bool:
        """Whether some tokens cannot come next."""
        return self._phase is not _Phase.FREE

    @property
    def complete(self) -> bool:
        """Whether nothing can follow, so that the answer ends."""
        return self._phase is _Phase.COMPLETE

    def allowed(self) -> Allowed | None:
        """Return the tokens that may come next, bool [vocabulary]; None for all.

        Raises:
            FlashMoeError: the grammar became too complex; code "constraint_failed".
        """
        if self._phase is _Phase.FREE:
            return None
        if self._phase is _Phase.THINKING:
            allowed = np.ones(self._constraint.vocab_size, bool)
            allowed[self._stop_ids] = False
            return allowed
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check()
        bits = np.unpackbits(self._words.view(np.uint8), count=self._constraint.vocab_size, bitorder="little")
        allowed = bits.view(bool)
        if self._think_id is not None:
            allowed[self._think_id] = True
        allowed[[token for token, count in self._newline_ids.items() if count <= self._newlines]] = True
        return allowed

    def fitting(self, token: int, left: int) -> int:
        """Return ``token``, or another one after which the answer can still be complete.

        Args:
            token: an allowed token.
            left: the largest number of tokens that the answer may still have, ``token`` included.
        """
        if self._phase is not _Phase.GRAMMAR or self._newlines or token == self._think_id or token in self._stop_ids:
            return token
        if self._near is None:
            self._ending = self._constraint.endings.find(self._matcher)
            self._near = 0 if self._ending is None else 2 * len(self._ending) + _NEAR
        if left > self._near:
            return token
        if self._ending is None:
            self._ending = self._constraint.endings.find(self._matcher)
        if self._ending is None or len(self._ending) > left or self._ending[:1] == [token]:
            return token
        after = self._matcher.deep_copy()
        rest = self._constraint.endings.find(after) if after.consume_token(token) else None
        if rest is not None and len(rest) < left:
            self._ending = [token, *rest]
            return token
        self.shortened = True
        return (self._ending or self._stop_ids or [token])[0]

    def add(self, token: int) -> None:
        """Add the next token of the answer, which is not the end of the answer.

        Raises:
            FlashMoeError: the grammar refuses the token; code "constraint_failed".
        """
        if self._phase is _Phase.GRAMMAR and not self._begins_thinking(token):
            self._consume(token)
            self._ending = self._ending[1:] if self._ending and self._ending[0] == token else None
        text = self._detokenizer.add(token)
        _, content = self._splitter.split(token, text)
        if self._phase is _Phase.THINKING and not self._splitter.open:
            self._phase = _Phase.GRAMMAR
            self._newlines = _MOST_NEWLINES
        elif self._phase is _Phase.FREE:
            tags = [index for index, segment in enumerate(content) if segment.tag == TOOL_CALL]
            if tags:
                self._begin_call("".join(segment.text for segment in content[tags[0] + 1 :]))

    def forced(self) -> list[int]:
        """Return the tokens that must come next; empty if there is a choice or the answer is complete."""
        if self._phase is not _Phase.GRAMMAR or self._newlines or self._think_id is not None:
            return []
        forced: list[int] = self._matcher.compute_ff_tokens()
        return forced

    def _begins_thinking(self, token: int) -> bool:
        """Read a token that precedes the answer: the beginning of thinking, or newlines after it."""
        if token == self._think_id:
            self._phase = _Phase.THINKING
        elif self._newline_ids.get(token, _MOST_NEWLINES + 1) <= self._newlines:
            self._newlines -= self._newline_ids[token]
            return True
        else:
            self._newlines = 0
        self._think_id = None
        return self._phase is _Phase.THINKING

    def _begin_call(self, text: str) -> None:
        """Begin a call after ``<tool_call>``, with the ``text`` that the same token contained."""
        self._matcher = self._constraint.matcher.deep_copy()
        self._ending = self._near = None
        if not text or self._matcher.consume_tokens(self._constraint.tokenizer.encode(text)):
            self._phase = _Phase.GRAMMAR

    def _consume(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()
        if self._matcher.is_stopped():
            free = self._constraint.each_call and not self._constraint.one_call
            self._phase = _Phase.FREE if free else _Phase.COMPLETE

    def _check(self) -> None:
        if self._matcher.is_error():
            raise FlashMoeError(
                f"the grammar cannot be followed any further: {self._matcher.get_error():.300}",
                code="constraint_failed",
            )
