"""Answers as the model wrote them, for clients that send them back without their thinking, or in another form.

A client gets thinking, text and tool calls apart. The template puts them together again, with True for true, other
spaces between values, or without thinking. The tokens of the answer take the place of such a rendering if it says the
same.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from flashmoe_mlx.generation.prompt_cache.vocabulary import Vocabulary
from flashmoe_mlx.text.tags import END_THINK, THINK
from flashmoe_mlx.text.tool_calls import parse_tool_calls

_MOST_ANSWERS = 4096
_MOST_TOKENS = 4 * 2**20
_VERSIONS = 8
"""Answers to the same prompt that are remembered."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """The meaning of an answer."""

    thinks: bool
    reasoning: str
    content: str
    calls: list[tuple[str, Any]]

    def says(self, answer: "_Parts") -> bool:
        """Return whether this rendering of an answer means ``answer``, whose thinking it may lack."""
        return (
            self.thinks == answer.thinks
            and self.reasoning in ("", answer.reasoning)
            and self.content == answer.content
            and len(self.calls) == len(answer.calls)
            and all(
                name == other and _same(value, known)
                for (name, value), (other, known) in zip(self.calls, answer.calls, strict=True)
            )
        )


class AnswerMemory:
    """The latest answers, by their prompts."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        template = vocabulary.tokenizer.chat_template
        self._tool_format = (template and template.tool_format) or "qwen_xml"
        self._answers: OrderedDict[bytes, list[list[int]]] = OrderedDict()
        self._tokens = 0

    def clear(self) -> None:
        """Forget all answers."""
        self._answers.clear()
        self._tokens = 0

    def remember(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> None:
        """Remember the tokens of an answer, with the tokens that the prompt has after the header of the answer."""
        answers = self._vocabulary.answers(prompt_ids)
        if not answers or answers[-1][1] != len(prompt_ids) or not answer_ids:
            return
        start = answers[-1][0]
        ends = self._vocabulary.tokenizer.eos_token_ids
        answer = [*prompt_ids[start:], *(token for token in answer_ids if token not in ends)]
        name = _name(self._vocabulary.key(prompt_ids[:start]))
        versions = self._answers.setdefault(name, [])
        self._answers.move_to_end(name)
        if answer not in versions:
            versions.append(answer)
            self._tokens += len(answer)
            if len(versions) > _VERSIONS:
                self._tokens -= len(versions.pop(0))
        while len(self._answers) > _MOST_ANSWERS or (self._tokens > _MOST_TOKENS and len(self._answers) > 1):
            self._tokens -= sum(map(len, self._answers.popitem(last=False)[1]))

    def restored(self, prompt_ids: list[int]) -> list[int]:
        """Return a prompt in which the tokens of known answers replace other renderings of them."""
        if not self._answers:
            return prompt_ids
        result: list[int] = []
        hashed, done, copied = blake2b(digest_size=16), 0, 0
        for start, end in self._vocabulary.answers(prompt_ids)[:-1]:
            result += prompt_ids[copied:start]
            hashed.update(self._vocabulary.key(result[done:]))
            done, copied = len(result), end
            rendered = prompt_ids[start:end]
            versions = self._answers.get(hashed.digest(), [])
            result += self._version(rendered, versions) if rendered not in versions else rendered
        return result + prompt_ids[copied:]

    def _version(self, rendered: list[int], versions: list[list[int]]) -> list[int]:
        """Return the latest of ``versions`` that ``rendered`` says, or ``rendered``."""
        if not versions:
            return rendered
        said = self._parts(rendered)
        return next((answer for answer in reversed(versions) if said.says(self._parts(answer))), rendered)

    def _parts(self, answer: list[int]) -> _Parts:
        text = self._vocabulary.tokenizer.decode(answer)
        thinking, closed, rest = text.partition(END_THINK)
        content, calls = parse_tool_calls(rest if closed else text, tool_format=self._tool_format)
        return _Parts(
            text.lstrip().startswith(THINK),
            thinking.replace(THINK, "").strip() if closed else "",
            content.strip(),
            [(call.name, call.arguments) for call in calls],
        )


def _name(key: bytes) -> bytes:
    return blake2b(key, digest_size=16).digest()


def _same(value: Any, other: Any) -> bool:
    """Return whether two arguments are equal, whatever their form: ``True`` and ``true``, ``1`` and ``1.0``."""
    value, other = _plain(value), _plain(other)
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_same(value[name], other[name]) for name in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_same, value, other))
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _plain(value: Any) -> Any:
    """Return the value that a text stands for, if it stands for one."""
    if not isinstance(value, str):
        return value
    text = {"True": "true", "False": "false", "None": "null"}.get(value.strip(), value)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return value
