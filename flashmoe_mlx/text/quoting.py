"""Keep the names of a tokenizer's added tokens, such as ``<|im_end|>``, plain text where they occur in messages.

Otherwise a user, or a file that a tool reads, could end a turn and write the next one. An occurrence gets a mark after
its first character before the template is rendered. The output is encoded in parts that end at the marks, so no part
holds the name of an added token, except for the names that the template wrote.
"""

import re
from collections.abc import Mapping
from typing import Any

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.text.tags import END_THINK, THINK
from flashmoe_mlx.text.tokenizer import Tokenizer

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Code points that Unicode reserves for the internal use of programs."""


class Quoting:
    """The marks of one prompt.

    ``<think>`` and ``</think>`` in the content of an assistant's message stay tokens: clients without a field for the
    model's thinking send it back in the content.

    Args:
        tokenizer: the tokenizer.
        values: all messages, tools and other values of the prompt.

    Raises:
        InputError: the values use every mark; code "invalid_text".
    """

    def __init__(self, tokenizer: Tokenizer, *values: Any) -> None:
        self._tokenizer = tokenizer
        names = sorted(tokenizer.added_tokens, key=len, reverse=True)
        self._all = _pattern(names)
        self._without_thinking = _pattern([name for name in names if name not in (THINK, END_THINK)])
        texts = list(_texts(values))
        self._needed = self._all is not None and any(self._all.search(text) for text in texts)
        self._mark = _MARKS[0]
        if self._needed:
            unused = [mark for mark in _MARKS if not any(mark in text for text in texts)]
            if not unused:
                raise InputError("the messages hold every code point from U+FDD0 to U+FDEF", code="invalid_text")
            self._mark = unused[0]

    def mark(self, value: Any) -> Any:
        """Return a copy of ``value``, a text or a JSON value, with the marks."""
        return self._marked(value, self._all) if self._needed else value

    def encode(self, text: str) -> list[int]:
        """Return the tokens of the rendered ``text``."""
        parts = text.split(self._mark) if self._needed else [text]
        return [token for part in parts for token in self._tokenizer.encode(part)]

    def _marked(self, value: Any, names: re.Pattern[str] | None) -> Any:
        if isinstance(value, str):
            return value if names is None else names.sub(lambda found: found[0][0] + self._mark + found[0][1:], value)
        if isinstance(value, Mapping):
            own = value.get("role") == "assistant"
            return {
                name: self._marked(item, self._without_thinking if own and name == "content" else names)
                for name, item in value.items()
            }
        return [self._marked(item, names) for item in value] if isinstance(value, list | tuple) else value


def _pattern(names: list[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, names))) if names else None


def _texts(value: Any) -> list[str]:
    """Return all texts in ``value``, names of fields excluded."""
    found: list[str] = []
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, Mapping):
            rest += item.values()
        elif isinstance(item, list | tuple):
            rest += item
    return found
