"""The format of tool calls of Qwen3-Coder, Qwen3.5 and their successors.

The published templates write a call as follows::

    <tool_call>
    <function=NAME>
    <parameter=NAME>
    VALUE
    </parameter>
    </function>
    </tool_call>

Models deviate from this format, and values may contain the same tags. A closing tag therefore ends a value only if the
next tag is one that may follow it; everything else belongs to the value. The reader also accepts:

- a function without ``<tool_call>`` before it, if the function was declared and is closed;
- several functions in one block;
- missing ``</parameter>``, ``</function>`` and ``</tool_call>``.

Parameters without a name, and text between parameters, are ignored. Everything outside calls is text.
"""

from collections.abc import Iterable
from enum import Enum, auto

from flashmoe_mlx.text.tags import END_TOOL_CALL, TOOL_CALL, Segment, TagScanner
from flashmoe_mlx.text.tool_formats.answer_text import AnswerText
from flashmoe_mlx.text.tool_formats.calls import CallDelta, Output, ToolCall, json_text
from flashmoe_mlx.text.tool_formats.qwen_grammar import body_grammar
from flashmoe_mlx.text.tool_formats.qwen_value import (
    END_FUNCTION,
    END_PARAMETER,
    FUNCTION,
    MAY_FOLLOW,
    PARAMETER,
    ParameterValue,
)
from flashmoe_mlx.text.tool_formats.schemas import TEXT, ToolSchemas, convert

_LONGEST_NAME = 256


class _Mode(Enum):
    """The position of the reader: after ``<tool_call>`` in BLOCK, in a function but outside parameters in BODY."""

    TEXT = auto()
    BLOCK = auto()
    FUNCTION_NAME = auto()
    BODY = auto()
    PARAMETER_NAME = auto()
    VALUE = auto()


class QwenXmlReader:
    """A reader of an answer that was split into text and the tags ``<tool_call>`` and ``</tool_call>``.

    Text is held back only while it may be markup. The time is linear in the length of the text.

    Attributes:
        calls: the calls read so far. The last call may be incomplete. A call without ``<tool_call>`` is removed if it
            is not closed.
    """

    def __init__(self, tools: ToolSchemas) -> None:
        self.calls: list[ToolCall] = []
        self._tools = tools
        self._scanner = TagScanner({}, (FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER))
        self._output = Output()
        self._mode = _Mode.TEXT
        self._text = AnswerText()
        self._in_block = False
        """Whether ``</tool_call>`` is markup, because ``<tool_call>`` or a function preceded."""
        self._orphan = False
        """Whether the function has no ``<tool_call>`` before it."""
        self._after_function = False
        """Whether only whitespace followed the last function of this block."""
        self._raw: list[str] = []
        """The input since the beginning of the call, which becomes text if the call turns out not to be one."""
        self._deltas: list[CallDelta] = []
        """Pieces of a call that may still turn out to be text."""
        self._call = ToolCall("", {})
        self._begun = False
        """Whether a parameter or an end tag followed the name of the function, so that ``_call`` is among ``calls``."""
        self._certain = False
        """Whether the call can no longer turn out to be text."""
        self._name = ""
        self._value = ParameterValue("", TEXT)

    def add(self, segments: Iterable[Segment]) -> Output:
        """Read the next segments of the answer; return the output that they complete."""
        for segment in segments:
            if segment.tag not in (TOOL_CALL, END_TOOL_CALL):
                self._read_all(self._scanner.add(None, segment.text))
            else:
                self._read_all([*self._scanner.finish(), segment])
        return self._flush()

    def finish(self, rest: str = "") -> Output:
        """Read ``rest``, which may be an incomplete tag, end the answer, and return the output that was held back."""
        if self._mode is not _Mode.VALUE and not (self._in_block and self._after_function):
            self._read_all(self._scanner.add(None, rest))
            rest = ""
        rest = "".join(segment.text for segment in self._scanner.finish()) + rest
        if self._mode is _Mode.VALUE:
            self._raw.append(rest)  # an incomplete tag is not part of a value
            self._end_value_at_end()
        elif self._mode is not _Mode.TEXT:
            self._raw.append(rest)
        elif not (self._in_block and self._after_function and END_TOOL_CALL.startswith(rest)):
            self._text.add(rest)
        if self._mode is not _Mode.TEXT and not self._certain:
            self._give_up()
        self._text.finish(bool(self.calls))
        return self._flush()

    def _flush(self) -> Output:
        """Return the output since the last call."""
        self._output.content += self._text.flush()
        output, self._output = self._output, Output()
        return output

    def _read_all(self, segments: Iterable[Segment]) -> None:
        for segment in segments:
            self._read(segment)

    def _read(self, segment: Segment) -> None:
        if not segment.text and not segment.tag:
            return
        if self._mode is _Mode.TEXT:
            self._read_text(segment)
            return
        if not self._certain:
            self._raw.append(segment.text)
        if self._mode is _Mode.BLOCK:
            self._read_block(segment)
        elif self._mode is _Mode.FUNCTION_NAME:
            self._read_function_name(segment)
        elif self._mode is _Mode.BODY:
            self._read_body(segment)
        elif self._mode is _Mode.PARAMETER_NAME:
            self._read_parameter_name(segment)
        else:
            self._read_value(segment)

    # Outside functions

    def _read_text(self, segment: Segment) -> None:
        if segment.tag == TOOL_CALL:
            self._open(segment, _Mode.BLOCK)
        elif segment.tag == FUNCTION and not self._text.ends_with(TOOL_CALL):
            self._orphan = not (self._in_block and self._after_function)
            self._open(segment, _Mode.FUNCTION_NAME)
        elif segment.tag == END_TOOL_CALL and (self._in_block or self._after_function):
            self._in_block = False
            self._text.skip_to_call()
        else:
            if segment.tag or segment.text.strip():
                self._after_function = False
            self._text.add(segment.text)

    def _open(self, segment: Segment, mode: _Mode) -> None:
        self._raw = [segment.text]
        self._certain = False
        self._name = ""
        self._mode = mode

    def _give_up(self, unread: str = "") -> None:
        """Turn the input since the beginning of the call into text, except for its end ``unread``."""
        raw = "".join(self._raw)
        if self._begun:
            self.calls.pop()
        self._begun, self._deltas, self._raw = False, [], []
        self._mode = _Mode.TEXT
        self._after_function = False
        self._text.add(raw[: len(raw) - len(unread)])

    def _read_block(self, segment: Segment) -> None:
        if segment.tag == FUNCTION:
            self._orphan = False
            self._name = ""
            self._mode = _Mode.FUNCTION_NAME
        elif segment.tag != TOOL_CALL and (segment.tag or segment.text.strip()):
            self._give_up(segment.text)
            self._read(segment)

    def _read_function_name(self, segment: Segment) -> None:
        name, closed, rest = segment.text.partition(">")
        if not segment.tag:
            self._name += name
        function = _name(self._name)
        if segment.tag or "\n" in name or len(self._name) > _LONGEST_NAME or (closed and not function):
            self._give_up(segment.text)
            self._read(segment)
        elif closed and self._orphan and function not in self._tools:
            self._give_up(rest)
            self._read(Segment(rest))
        elif closed:
            self._name = function
            self._mode = _Mode.BODY
            if not self._certain:
                self._raw[-1] = self._raw[-1][: len(self._raw[-1]) - len(rest)]
            self._read(Segment(rest))

    # In a function

    def _read_body(self, segment: Segment) -> None:
        tag = segment.tag
        if not self._begun and tag not in (PARAMETER, END_FUNCTION, END_TOOL_CALL):
            if tag or segment.text.strip():
                self._give_up(segment.text)
                self._read(segment)
            return
        if tag in (PARAMETER, END_FUNCTION, END_TOOL_CALL):
            self._start()
        if tag == PARAMETER:
            self._name = ""
            self._mode = _Mode.PARAMETER_NAME
        elif tag in (END_FUNCTION, END_TOOL_CALL, FUNCTION, TOOL_CALL):
            self._end()
            if tag != END_FUNCTION:
                self._read(segment)

    def _start(self) -> None:
        """Add the call to ``calls``, unless that has been done."""
        if not self._begun:
            self._begun = True
            self._call = ToolCall(self._name, {}, complete=False)
            self.calls.append(self._call)
            self._emit(name=self._name)
            self._emit("{")
            if not self._orphan:
                self._be_certain()

    def _be_certain(self) -> None:
        """Output the pieces of the call, which cannot turn out to be text any more."""
        self._certain = True
        self._raw = []
        self._text.skip_to_call()
        self._output.calls += self._deltas
        self._deltas = []

    def _end(self) -> None:
        """Complete the call; text or a further call follows."""
        self._call.complete = True
        self._emit("}")
        self._be_certain()
        self._begun = False
        self._mode = _Mode.TEXT
        self._in_block = self._after_function = True

    def _emit(self, arguments: str = "", name: str | None = None) -> None:
        delta = CallDelta(len(self.calls) - 1, name, arguments)
        (self._output.calls if self._certain else self._deltas).append(delta)

    # In a parameter

    def _read_parameter_name(self, segment: Segment) -> None:
        line, newline, _ = segment.text.partition("\n")
        name, closed, _ = line.partition(">")
        room = _LONGEST_NAME - len(self._name)
        if segment.tag or len(name) > room or (newline and not closed):
            self._begin_value(None)
            self._read_value(Segment(segment.text[room:]) if len(name) > room else segment)
            return
        self._name += name
        if closed:
            self._begin_value(_name(self._name) or None)
            self._read_value(Segment(segment.text[len(name) + 1 :]))

    def _begin_value(self, name: str | None) -> None:
        self._value = ParameterValue(name, TEXT if name is None else self._tools.parameter(self._call.name, name))
        self._mode = _Mode.VALUE
        if self._value.streams:
            self._emit(f"{self._separator()}{json_text(name)}: " + '"')

    def _separator(self) -> str:
        return ", " if self._call.arguments else ""

    def _read_value(self, segment: Segment) -> None:
        value = self._value
        if self._orphan and segment.tag == TOOL_CALL:
            self._give_up(segment.text)
            self._read(segment)
        elif value.candidate == PARAMETER:
            self._read_boundary(segment)
        elif value.candidate and not segment.tag:
            rest = segment.text.lstrip()
            value.hold(segment.text[: len(segment.text) - len(rest)])
            if rest:
                self._emit_piece(value.release())
                self._emit_piece(value.append(rest))
        elif value.candidate and segment.tag in MAY_FOLLOW[value.candidate] and value.may_end():
            self._end_value()
            if value.candidate != END_PARAMETER:
                self._read_body(Segment(value.candidate, value.candidate))
            self._read_again(segment)
        else:
            self._emit_piece(value.release())
            if segment.tag == END_PARAMETER:
                self._emit_piece(value.reopen())
            if value.may_begin_end(segment.tag):
                value.begin_end(segment)
            else:
                self._emit_piece(value.append(segment.text))

    def _read_again(self, segment: Segment) -> None:
        """Read a segment that ``_raw`` already contains."""
        if self._mode is not _Mode.TEXT and not self._certain:
            self._raw.pop()
        self._read(segment)

    def _read_boundary(self, segment: Segment) -> None:
        """Read on after a ``<parameter=`` inside a value: the next parameter, if its name is declared.

        The name must be new, too, unless the value has been closed.
        """
        value = self._value
        name, closed, rest = segment.text.partition(">")
        if not segment.tag and not closed and "\n" not in name:
            value.hold(segment.text)
            return
        name = _name(value.held_text()[len(PARAMETER) :] + name)
        new = value.closed or (name not in self._call.arguments and name != value.name)
        declared = self._tools.declares(self._call.name, name)
        if segment.tag or not closed or not name or "\n" in name or not (new and declared):
            self._emit_piece(value.release())
            self._read_value(segment)
            return
        self._end_value()
        self._begin_value(name)
        self._read_value(Segment(rest))

    def _emit_piece(self, piece: str) -> None:
        """Output a piece of the value if the value is a string."""
        if piece and self._value.streams:
            self._emit(json_text(piece)[1:-1])

    def _end_value(self) -> None:
        value = self._value
        self._mode = _Mode.BODY
        self._emit_piece(value.close())
        if value.name is None:
            return
        text = value.text()
        converted = convert(text, value.parameter)
        before, tag, _ = text.partition(END_PARAMETER)
        if tag and converted is not None and not value.parameter.fits(converted[0]):
            first = convert(before, value.parameter)  # for example a number, a closing tag and noise
            converted = first if first is not None and value.parameter.fits(first[0]) else converted
        if value.streams:
            self._emit('"')
        elif converted is not None:
            self._emit(f"{self._separator()}{json_text(value.name)}: {converted[1]}")
        if converted is not None:
            self._call.arguments[value.name] = converted[0]

    def _end_value_at_end(self) -> None:
        """End the answer inside a value; without a closing tag, keep the value only if it is a string."""
        value = self._value
        if value.candidate in MAY_FOLLOW:
            self._end_value()
            if value.candidate != END_PARAMETER:
                self._read_body(Segment(value.candidate, value.candidate))
        elif value.closed:
            self._end_value()
        elif value.name is not None and value.streams:
            self._emit_piece(value.release())
            self._call.arguments[value.name] = value.text()


def _name(text: str) -> str:
    """Return the name in a tag, without surrounding spaces and quotes."""
    name = text.strip()
    quoted = len(name) > 1 and name[0] == name[-1] and name[0] in "\"'"
    return name[1:-1].strip() if quoted else name


READER = QwenXmlReader
GRAMMAR = body_grammar
