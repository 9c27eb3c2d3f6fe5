"""Tags such as ``<think>`` in a stream of tokens: found by token id where a tokenizer has them as single tokens.

Only the token is the tag then: the same characters in other tokens were quoted or typed, and are text. For tokenizers
without the token, the characters are the tag, wherever the pieces are cut.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TAGS = (THINK, END_THINK, TOOL_CALL, END_TOOL_CALL)


class Segment(NamedTuple):
    """A piece of text, or one tag."""

    text: str
    tag: str = ""
    """The tag that ``text`` is; empty for plain text."""


class TagScanner:
    """Splits a stream into text and tags.

    ``added_tokens`` are the ids of a tokenizer's added tokens by their text. Each tag must begin with ``<`` and hold
    no other ``<``.
    """

    def __init__(self, added_tokens: Mapping[str, int], tags: Iterable[str] = TAGS) -> None:
        tags = tuple(tags)
        self._ids = {added_tokens[tag]: tag for tag in tags if tag in added_tokens}
        self._texts = tuple(tag for tag in tags if tag not in added_tokens)
        self._pattern = re.compile("|".join(map(re.escape, self._texts)))
        self._held = ""
        """The beginning of a tag, perhaps."""

    def add(self, token_id: int | None, text: str) -> list[Segment]:
        """Take one token and the text that it made certain; returns the segments that are complete.

        ``token_id`` is None for text that is not tokenized.
        """
        tag = None if token_id is None else self._ids.get(token_id)
        if tag is None:
            return list(self._scan(text))
        before = text.removesuffix(tag)
        shown = text[len(before) :]
        return [*self._scan(before), *self.finish(), Segment(shown, tag)]

    def finish(self) -> list[Segment]:
        """Return the text that was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return [Segment(held)] if held else []

    def _scan(self, text: str) -> Iterator[Segment]:
        text, self._held = self._held + text, ""
        done = 0
        for match in self._pattern.finditer(text) if self._texts else ():
            if done < match.start():
                yield Segment(text[done : match.start()])
            yield Segment(match[0], match[0])
            done = match.end()
        last = text.rfind("<", done)
        if last >= 0 and any(tag.startswith(text[last : last + len(tag)]) for tag in self._texts):
            text, self._held = text[:last], text[last:]
        if done < len(text):
            yield Segment(text[done:])
