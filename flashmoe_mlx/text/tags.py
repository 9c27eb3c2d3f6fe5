"""Find tags such as ``<think>`` in a stream of tokens.

If the tokenizer has a token for a tag, only that token is the tag; the same characters in different tokens are quoted
text. Otherwise the characters are the tag, even if they are split across tokens.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TAGS = (THINK, END_THINK, TOOL_CALL, END_TOOL_CALL)


class Segment(NamedTuple):
    """A piece of text, or one tag; ``tag`` is empty for plain text."""

    text: str
    tag: str = ""


class TagScanner:
    """A scanner that splits a stream into text and tags.

    Args:
        added_tokens: ids of a tokenizer's added tokens by their text.
        tags: tags to find; each must begin with ``<`` and must not contain a second ``<``.
    """

    def __init__(self, added_tokens: Mapping[str, int], tags: Iterable[str] = TAGS) -> None:
        tags = tuple(tags)
        self._ids = {added_tokens[tag]: tag for tag in tags if tag in added_tokens}
        self._texts = tuple(tag for tag in tags if tag not in added_tokens)
        self._pattern = re.compile("|".join(map(re.escape, self._texts)))
        self._held = ""
        """Text that may be the beginning of a tag."""

    def add(self, token_id: int | None, text: str) -> list[Segment]:
        """Add a token and the text that it completed; return the complete segments.

        ``token_id`` is None for text that does not come from a token.
        """
        tag = None if token_id is None else self._ids.get(token_id)
        if tag is None:
            return list(self._scan(text))
        preceding = text.removesuffix(tag)
        tag_text = text[len(preceding) :]
        return [*self._scan(preceding), *self.finish(), Segment(tag_text, tag)]

    def finish(self) -> list[Segment]:
        """End the stream and return the text that was held back."""
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
