"""The format of tool calls of Hermes, which Qwen3 and Qwen3-Next use: JSON between tags.

The published templates write a call as follows::

    <tool_call>
    {"name": "NAME", "arguments": {"NAME": VALUE}}
    </tool_call>

The reader also accepts several objects in one block, a list of objects, arguments under ``parameters`` or as JSON text,
values of Python (``True``, ``None``, quotes of one kind), and a missing ``</tool_call>`` at the end. A closing tag
inside a string belongs to the string. A block without a call is text.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flashmoe_mlx.text.tags import END_TOOL_CALL, TOOL_CALL, Segment
from flashmoe_mlx.text.tool_formats.answer_text import AnswerText
from flashmoe_mlx.text.tool_formats.calls import CallDelta, Output, ToolCall, json_text
from flashmoe_mlx.text.tool_formats.schemas import ToolSchemas

_DECODER = json.JSONDecoder()
_SPACE, _BETWEEN, _COLON = re.compile(r"\s*"), re.compile(r"[\s,;]*"), re.compile(r"\s*:?\s*")
_BEGINNING = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{\s*')
"""The beginning of a call up to its first argument, with the name as JSON."""
_LONGEST_PYTHON = 2**16
"""Number of characters of a call that may be read as Python, whose parser needs much memory."""


class HermesReader:
    """A reader of an answer that was split into text and the tags ``<tool_call>`` and ``</tool_call>``.

    A call is output when its block ends. The time is linear in the length of the text.

    Attributes:
        calls: the calls read so far. The last call may be incomplete.
    """

    def __init__(self, tools: ToolSchemas) -> None:  # noqa: ARG002  # JSON has types
        self.calls: list[ToolCall] = []
        self._output = Output()
        self._text = AnswerText()
        self._block: list[str] | None = None
        """The input since ``<tool_call>``; None outside blocks."""
        self._in_string = self._escaped = False

    def add(self, segments: Iterable[Segment]) -> Output:
        """Read the next segments of the answer; return the output that they complete."""
        for segment in segments:
            self._read(segment)
        return self._flush()

    def finish(self, rest: str = "") -> Output:
        """Read ``rest``, which may be an incomplete tag, end the answer, and return the output that was held back."""
        if self._block is None:
            self._text.add(rest)
        else:
            self._end_block("" if END_TOOL_CALL.startswith(rest) else rest, ended=False)
        self._text.finish(bool(self.calls))
        return self._flush()

    def _flush(self) -> Output:
        self._output.content += self._text.flush()
        output, self._output = self._output, Output()
        return output

    def _read(self, segment: Segment) -> None:
        if self._block is None:
            if segment.tag == TOOL_CALL:
                self._block, self._in_string, self._escaped = [], False, False
            else:
                self._text.add(segment.text)
        elif segment.tag == END_TOOL_CALL and not self._in_string:
            self._end_block("", ended=True)
        else:
            self._block.append(segment.text)
            self._follow_strings(segment.text)

    def _follow_strings(self, text: str) -> None:
        """Track whether the end of ``text`` is inside a JSON string."""
        for character in text:
            if self._escaped:
                self._escaped = False
            elif character == '"':
                self._in_string = not self._in_string
            elif character == "\\":
                self._escaped = self._in_string

    def _end_block(self, rest: str, ended: bool) -> None:
        body, self._block = "".join([*(self._block or ()), rest]), None
        found = _calls_in(body)
        if not found and not ended:
            begun = _begun_call(body)
            found = [] if begun is None else [begun]
        if not found:
            self._text.add(TOOL_CALL + body + (END_TOOL_CALL if ended else ""))
            return
        self._text.skip_to_call()
        for call in found:
            index = len(self.calls)
            self.calls.append(call)
            whole = json_text(call.arguments)
            self._output.calls.append(CallDelta(index, call.name, whole if call.complete else whole[:-1]))


def _calls_in(body: str) -> list[ToolCall]:
    """Return the calls in a block; none if a part of it is not a call."""
    values, at = [], _after(_SPACE, body, 0)
    while at < len(body):
        try:
            value, at = _DECODER.raw_decode(body, at)
        except (ValueError, RecursionError):
            value, at = _python(body[at:]), len(body)
        values += value if isinstance(value, list) else [value]
        at = _after(_BETWEEN, body, at)
    calls = [_call(value) for value in values]
    return [call for call in calls if call is not None] if None not in calls else []


def _python(text: str) -> Any:
    """Return the value of a Python literal made of JSON types, or None."""
    if len(text) > _LONGEST_PYTHON:
        return None
    try:
        value = ast.literal_eval(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value


def _call(value: Any) -> ToolCall | None:
    if not isinstance(value, Mapping):
        return None
    value = value.get("function", value) if isinstance(value.get("function"), Mapping) else value
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict | None):
        return None
    return ToolCall(name.strip(), {str(key): item for key, item in (arguments or {}).items()})


def _begun_call(body: str) -> ToolCall | None:
    """Return the call that the answer ended inside of, with its complete arguments; None if its name is not known."""
    found = _BEGINNING.match(body)
    if found is None:
        return None
    try:
        name = json.loads(found[1])
    except ValueError:
        return None
    arguments: dict[str, Any] = {}
    at = found.end()
    while body.startswith('"', at):
        try:
            argument, end = _DECODER.raw_decode(body, at)
            item, end = _DECODER.raw_decode(body, _after(_COLON, body, end))
        except (ValueError, RecursionError):
            break
        at = _after(_BETWEEN, body, end)
        if at == len(body) and body[-1] not in '"]},':
            break  # a number may go on
        arguments[argument] = item
    return ToolCall(name.strip(), arguments, complete=False) if name.strip() else None


def _after(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Return the end of the match of ``pattern``, which may be empty, from ``start`` on."""
    found = pattern.match(text, start)
    return start if found is None else found.end()


def call_grammar(tools: Sequence[Mapping[str, Any]], fits: Callable[[Mapping[str, Any]], bool], end: str) -> str:
    """Return rules whose symbol ``body`` is a call of one of ``tools``, from the text after ``<tool_call>``.

    Args:
        tools: declarations of functions, at least one.
        fits: tells whether a schema can be enforced; other arguments may be any object.
        end: the symbol of ``</tool_call>``.
    """
    rules = []
    schemas = ToolSchemas(tools)
    for index, name in enumerate(schemas.names):
        schema = schemas.root(name)
        schema = schema if schema and fits(schema) else {"type": "object"}
        begin = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ', ensure_ascii=False)
        rules.append(f'f{index}: {begin} %json {json.dumps(schema)} "}}"')
    functions = " | ".join(f"f{index}" for index in range(len(rules)))
    return "\n".join([*rules, f'body: "\\n" ({functions}) "\\n" {end}'])


READER = HermesReader
GRAMMAR = call_grammar
