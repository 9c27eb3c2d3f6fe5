"""Tool calls of Qwen3-Coder, Qwen3.5 and their successors: ``<function=NAME>`` with a ``<parameter=NAME>`` each.

As the published templates write a call::

    <tool_call>
    <function=NAME>
    <parameter=NAME>
    VALUE
    </parameter>
    </function>
    </tool_call>

Models deviate from it, and values may hold the same tags. So a closing tag ends a value only if another tag that may
follow it comes next; everything else belongs to the value. Read as calls are also: a function without ``<tool_call>``
before it, if it was offered and is closed; several functions in one block; missing ``</parameter>``, ``</function>``
and ``</tool_call>``. A parameter without a name is ignored, and so is text between parameters. All that is no call is
text.
"""

from collections.abc import Iterable
from enum import Enum, auto

from flashmoe_mlx.text.tags import END_TOOL_CALL, TOOL_CALL, Segment, TagScanner
from flashmoe_mlx.text.tool_formats.answer_text import AnswerText
from flashmoe_mlx.text.tool_formats.calls import CallDelta, Output, ToolCall, json_text
from flashmoe_mlx.text.tool_formats.qwen_value import (
    END_FUNCTION,
    END_PARAMETER,
    FUNCTION,
    MAY_FOLLOW,
    PARAMETER,
    Value,
)
from flashmoe_mlx.text.tool_formats.schemas import TEXT, ToolSchemas, convert

_LONGEST_NAME = 256


class _Mode(Enum):
    TEXT = auto()
    BLOCK = auto()
    """After ``<tool_call>``."""
    FUNCTION_NAME = auto()
    BODY = auto()
    """In a function, outside its parameters."""
    PARAMETER_NAME = auto()
    VALUE = auto()


class QwenXmlReader:
    """Reads an answer, already split into text and the tags ``<tool_call>`` and ``</tool_call>``.

    ``calls`` are those found so far; the last may be incomplete, and a call without ``<tool_call>`` counts once it is
    closed. Text is held back only while it may still be markup. Time is linear in the text.
    """

    def __init__(self, tools: ToolSchemas) -> None:
        self.calls: list[ToolCall] = []
        self._tools = tools
        self._scanner = TagScanner({}, (FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER))
        self._output = Output()
        self._mode = _Mode.TEXT
        self._text = AnswerText()
        self._in_block = False
        """``<tool_call>`` came, or a function without it: ``</tool_call>`` is markup."""
        self._orphan = False
        """The function has no ``<tool_call>`` before it."""
        self._after_function = False
        """Only whitespace came since a function of this block ended."""
        self._raw: list[str] = []
        """What would be text if this were no call."""
        self._deltas: list[CallDelta] = []
        """Pieces of a call that may yet turn out to be text."""
        self._call = ToolCall("", {})
        self._begun = False
        """A parameter or an end tag followed the function's name: ``_call`` is among the calls."""
        self._certain = False
        """The call cannot become text any more."""
        self._name = ""
        self._value = Value("", TEXT)

    def feed(self, segments: Iterable[Segment]) -> Output:
        """Take the next segments of the answer; returns what they made certain."""
        for segment in segments:
            if segment.tag not in (TOOL_CALL, END_TOOL_CALL):
                self._take_all(self._scanner.add(None, segment.text))
            else:
                self._take_all([*self._scanner.finish(), segment])
        return self._taken()

    def finish(self, rest: str = "") -> Output:
        """End the answer with ``rest``, perhaps half a tag; returns what was held back."""
        if self._mode is not _Mode.VALUE and not (self._in_block and self._after_function):
            self._take_all(self._scanner.add(None, rest))
            rest = ""
        rest = "".join(segment.text for segment in self._scanner.finish()) + rest
        if self._mode is _Mode.VALUE:
            self._raw.append(rest)  # half a tag belongs to no value
            self._end_value_at_end()
        elif self._mode is not _Mode.TEXT:
            self._raw.append(rest)
        elif not (self._in_block and self._after_function and END_TOOL_CALL.startswith(rest)):
            self._text.add(rest)
        if self._mode is not _Mode.TEXT and not self._certain:
            self._give_up()
        self._text.finish(bool(self.calls))
        return self._taken()

    def _taken(self) -> Output:
        self._output.content += self._text.take()
        output, self._output = self._output, Output()
        return output

    def _take_all(self, segments: Iterable[Segment]) -> None:
        for segment in segments:
            self._take(segment)

    def _take(self, segment: Segment) -> None:
        if not segment.text and not segment.tag:
            return
        if self._mode is _Mode.TEXT:
            self._take_text(segment)
            return
        if not self._certain:
            self._raw.append(segment.text)
        if self._mode is _Mode.BLOCK:
            self._take_in_block(segment)
        elif self._mode is _Mode.FUNCTION_NAME:
            self._take_function_name(segment)
        elif self._mode is _Mode.BODY:
            self._take_in_body(segment)
        elif self._mode is _Mode.PARAMETER_NAME:
            self._take_parameter_name(segment)
        else:
            self._take_in_value(segment)

    # Outside functions

    def _take_text(self, segment: Segment) -> None:
        if segment.tag == TOOL_CALL:
            self._open(segment, _Mode.BLOCK)
        elif segment.tag == FUNCTION and not self._text.ends_with(TOOL_CALL):
            self._orphan = not (self._in_block and self._after_function)
            self._open(segment, _Mode.FUNCTION_NAME)
        elif segment.tag == END_TOOL_CALL and (self._in_block or self._after_function):
            self._in_block = False
            self._text.meet_call()
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
        """Make text of what seemed to be a call, except for ``unread``, which is looked at again."""
        raw = "".join(self._raw)
        if self._begun:
            self.calls.pop()
        self._begun, self._deltas, self._raw = False, [], []
        self._mode = _Mode.TEXT
        self._after_function = False
        self._text.add(raw[: len(raw) - len(unread)])

    def _take_in_block(self, segment: Segment) -> None:
        if segment.tag == FUNCTION:
            self._orphan = False
            self._name = ""
            self._mode = _Mode.FUNCTION_NAME
        elif segment.tag != TOOL_CALL and (segment.tag or segment.text.strip()):
            self._give_up(segment.text)
            self._take(segment)

    def _take_function_name(self, segment: Segment) -> None:
        name, closed, rest = segment.text.partition(">")
        if not segment.tag:
            self._name += name
        function = _name(self._name)
        if segment.tag or "\n" in name or len(self._name) > _LONGEST_NAME or (closed and not function):
            self._give_up(segment.text)
            self._take(segment)
        elif closed and self._orphan and function not in self._tools:
            self._give_up(rest)
            self._take(Segment(rest))
        elif closed:
            self._name = function
            self._mode = _Mode.BODY
            if not self._certain:
                self._raw[-1] = self._raw[-1][: len(self._raw[-1]) - len(rest)]
            self._take(Segment(rest))

    # In a function

    def _take_in_body(self, segment: Segment) -> None:
        tag = segment.tag
        if not self._begun and tag not in (PARAMETER, END_FUNCTION, END_TOOL_CALL):
            if tag or segment.text.strip():
                self._give_up(segment.text)
                self._take(segment)
            return
        if tag in (PARAMETER, END_FUNCTION, END_TOOL_CALL):
            self._start()
        if tag == PARAMETER:
            self._name = ""
            self._mode = _Mode.PARAMETER_NAME
        elif tag in (END_FUNCTION, END_TOOL_CALL, FUNCTION, TOOL_CALL):
            self._end()
            if tag != END_FUNCTION:
                self._take(segment)

    def _start(self) -> None:
        """Begin a call, unless it has begun."""
        if not self._begun:
            self._begun = True
            self._call = ToolCall(self._name, {}, complete=False)
            self.calls.append(self._call)
            self._emit(name=self._name)
            self._emit("{")
            if not self._orphan:
                self._be_certain()

    def _be_certain(self) -> None:
        self._certain = True
        self._raw = []
        self._text.meet_call()
        self._output.calls += self._deltas
        self._deltas = []

    def _end(self) -> None:
        """End the call; what follows is text or another call."""
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

    def _take_parameter_name(self, segment: Segment) -> None:
        line, newline, _ = segment.text.partition("\n")
        name, closed, _ = line.partition(">")
        room = _LONGEST_NAME - len(self._name)
        if segment.tag or len(name) > room or (newline and not closed):
            self._begin_value(None)
            self._take_in_value(Segment(segment.text[room:]) if len(name) > room else segment)
            return
        self._name += name
        if closed:
            self._begin_value(_name(self._name) or None)
            self._take_in_value(Segment(segment.text[len(name) + 1 :]))

    def _begin_value(self, name: str | None) -> None:
        self._value = Value(name, TEXT if name is None else self._tools.parameter(self._call.name, name))
        self._mode = _Mode.VALUE
        if self._value.streams:
            self._emit(f"{self._separator()}{json_text(name)}: " + '"')

    def _separator(self) -> str:
        return ", " if self._call.arguments else ""

    def _take_in_value(self, segment: Segment) -> None:
        value = self._value
        if self._orphan and segment.tag == TOOL_CALL:
            self._give_up(segment.text)
            self._take(segment)
        elif value.candidate == PARAMETER:
            self._take_boundary(segment)
        elif value.candidate and not segment.tag:
            rest = segment.text.lstrip()
            value.hold(segment.text[: len(segment.text) - len(rest)])
            if rest:
                self._pass_on(value.release())
                self._pass_on(value.keep(rest))
        elif value.candidate and segment.tag in MAY_FOLLOW[value.candidate] and value.may_end():
            self._end_value()
            if value.candidate != END_PARAMETER:
                self._take_in_body(Segment(value.candidate, value.candidate))
            self._take_without_raw(segment)
        else:
            self._pass_on(value.release())
            if segment.tag == END_PARAMETER:
                self._pass_on(value.reopen())
            if value.may_begin_end(segment.tag):
                value.begin_end(segment)
            else:
                self._pass_on(value.keep(segment.text))

    def _take_without_raw(self, segment: Segment) -> None:
        """Take a segment again that ``_raw`` has already."""
        if self._mode is not _Mode.TEXT and not self._certain:
            self._raw.pop()
        self._take(segment)

    def _take_boundary(self, segment: Segment) -> None:
        """Read on after a ``<parameter=`` inside a value: the next parameter, if its name is declared.

        The name must be new, too, unless the value has been closed.
        """
        value = self._value
        name, closed, rest = segment.text.partition(">")
        if not segment.tag and not closed and "\n" not in name:
            value.hold(segment.text)
            return
        name = _name(value.held()[len(PARAMETER) :] + name)
        new = value.closed or (name not in self._call.arguments and name != value.name)
        declared = self._tools.declares(self._call.name, name)
        if segment.tag or not closed or not name or "\n" in name or not (new and declared):
            self._pass_on(value.release())
            self._take_in_value(segment)
            return
        self._end_value()
        self._begin_value(name)
        self._take_in_value(Segment(rest))

    def _pass_on(self, piece: str) -> None:
        """Emit a piece of a value that is a string."""
        if piece and self._value.streams:
            self._emit(json_text(piece)[1:-1])

    def _end_value(self) -> None:
        value = self._value
        self._mode = _Mode.BODY
        self._pass_on(value.close())
        if value.name is None:
            return
        text = value.text()
        converted = convert(text, value.parameter)
        before, tag, _ = text.partition(END_PARAMETER)
        if tag and converted is not None and not value.parameter.fits(converted[0]):
            first = convert(before, value.parameter)  # such as a number, a closing tag, and noise
            converted = first if first is not None and value.parameter.fits(first[0]) else converted
        if value.streams:
            self._emit('"')
        elif converted is not None:
            self._emit(f"{self._separator()}{json_text(value.name)}: {converted[1]}")
        if converted is not None:
            self._call.arguments[value.name] = converted[0]

    def _end_value_at_end(self) -> None:
        """End the output inside a value: whole if its closing tag came, otherwise as much of a string as came."""
        value = self._value
        if value.candidate in MAY_FOLLOW:
            self._end_value()
            if value.candidate != END_PARAMETER:
                self._take_in_body(Segment(value.candidate, value.candidate))
        elif value.closed:
            self._end_value()
        elif value.name is not None and value.streams:
            self._pass_on(value.release())
            self._call.arguments[value.name] = value.text()


def _name(text: str) -> str:
    """Return the name in a tag, without spaces and quotes around it."""
    name = text.strip()
    quoted = len(name) > 1 and name[0] == name[-1] and name[0] in "\"'"
    return name[1:-1].strip() if quoted else name


READER = QwenXmlReader
