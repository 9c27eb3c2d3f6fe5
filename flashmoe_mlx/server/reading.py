"""Conversion of a sequence's tokens to events: the one place where an answer is taken apart."""

import time
import uuid
from typing import Any

from flashmoe_mlx.generation.logprobs import TokenLogprobs
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.generation.text_stream import Piece, TextStream
from flashmoe_mlx.server.answer import Prepared
from flashmoe_mlx.server.events import (
    CallArguments,
    CallEnded,
    CallStarted,
    EndReason,
    Event,
    Finished,
    Prefilled,
    PromptScored,
    Reasoning,
    Text,
    Usage,
)
from flashmoe_mlx.text.tokenizer import Tokenizer

_BETWEEN_REPORTS = 1.0
"""Seconds between two reports of the progress through a prompt."""


class AnswerReader:
    """A reader of the tokens of one sequence.

    Args:
        prepared: the request.
        sequence: its sequence.
        tokenizer: the tokenizer of the model.
        max_context: the number of tokens that the context holds.
    """

    def __init__(self, prepared: Prepared, sequence: Sequence, tokenizer: Tokenizer, max_context: int) -> None:
        self._sequence = sequence
        self._tokenizer = tokenizer
        self._tools = prepared.tool_reader
        self._max_context = max_context
        self._stream = TextStream(sequence, tokenizer, prepared.tool_reader)
        self._ended_calls = 0
        self._generates = prepared.generates
        self._scored = sequence.request.prompt_logprobs is None
        """Whether the log probabilities of the prompt were given, or are not wanted."""

    def take(self) -> list[Event]:
        """Return the events of the tokens since the last call; those of a finished sequence end the answer."""
        piece = self._stream.take()
        if piece is None:
            return []
        events: list[Event] = []
        if not self._scored:
            self._scored = True
            events.append(PromptScored(tuple(self._sequence.prompt_logprobs)))
        if not self._generates:
            return [*events, Finished("length", usage_of(self._sequence))]
        if piece.reasoning:
            events.append(Reasoning(piece.reasoning))
        if piece.text and not piece.calls:
            events.append(Text(piece.text, self._logprobs_of(piece)))
        elif piece.calls:
            events += self._calls(piece)
        if piece.finish_reason is not None:
            events.append(Finished(self._reason(piece), self.usage(), piece.stop))
        return events

    def usage(self) -> Usage:
        """Return the numbers of tokens so far."""
        tokens = len(self._sequence.token_ids)
        return usage_of(self._sequence, completion=tokens, reasoning=min(tokens, self._stream.reasoning_tokens))

    def _calls(self, piece: Piece) -> list[Event]:
        """Return the events of the calls in ``piece``; its text comes before the first new call, or at the end."""
        assert self._tools is not None
        events: list[Event] = []
        for delta in piece.calls:
            if delta.name is not None:
                events += self._ends(delta.index)
                if piece.text and not any(isinstance(event, Text) for event in events):
                    events.append(Text(piece.text, self._logprobs_of(piece)))
                events.append(CallStarted(delta.index, f"call_{uuid.uuid4().hex[:24]}", delta.name))
            if delta.arguments:
                events.append(CallArguments(delta.index, delta.arguments))
        events += self._ends(len(self._tools.calls))
        if piece.text and not any(isinstance(event, Text) for event in events):
            events.append(Text(piece.text, self._logprobs_of(piece)))
        return events

    def _ends(self, before: int) -> list[Event]:
        """Return the ends of complete calls with a lower index than ``before``."""
        assert self._tools is not None
        events: list[Event] = []
        while self._ended_calls < min(before, len(self._tools.calls)) and self._tools.calls[self._ended_calls].complete:
            events.append(CallEnded(self._ended_calls))
            self._ended_calls += 1
        return events

    def _reason(self, piece: Piece) -> EndReason:
        if piece.finish_reason == "cancelled":
            return "cancelled"
        if piece.finish_reason == "length":
            request = self._sequence.request
            return "length" if len(self._sequence.token_ids) >= request.max_tokens else "context"
        if self._ended_calls:
            return "tool_calls"
        return "stop" if piece.stop is None else "stop_string"

    def _logprobs_of(self, piece: Piece) -> tuple[TokenLogprobs, ...]:
        """Return the log probabilities of the tokens of the text, without those of thinking and of markup before it."""
        wanted, found = len(piece.text.encode()), 0
        kept = [entry for entry in piece.logprobs if entry.token_id not in self._sequence.request.stop_ids]
        for first in range(len(kept) - 1, -1, -1):
            found += len(self._tokenizer.token_bytes(kept[first].token_id))
            if found >= wanted:
                return tuple(kept[first:])
        return tuple(kept)


class PrefillReports:
    """A listener to the progress through a prompt, which keeps the latest report for the next events."""

    def __init__(self, publish: Any) -> None:
        self._publish = publish
        self._next = time.monotonic() + _BETWEEN_REPORTS

    def __call__(self, done: int, total: int) -> None:
        """Publish that ``done`` of ``total`` tokens are processed, unless the last report was a moment ago."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _BETWEEN_REPORTS
            self._publish([Prefilled(done, total)])


def usage_of(sequence: Sequence, completion: int = 0, reasoning: int = 0) -> Usage:
    """Return the numbers of tokens of ``sequence``."""
    return Usage(len(sequence.request.prompt_ids), sequence.metrics.reused_tokens, completion, reasoning)
