"""The tags of Qwen's format for tool calls, and the value of a parameter between them."""

from flashmoe_mlx.text.tags import END_TOOL_CALL, TOOL_CALL, Segment
from flashmoe_mlx.text.tool_formats.schemas import STRING, Parameter

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
MAY_FOLLOW: dict[str, tuple[str, ...]] = {
    END_PARAMETER: (PARAMETER, END_FUNCTION, END_TOOL_CALL, FUNCTION, TOOL_CALL),
    END_FUNCTION: (END_TOOL_CALL, FUNCTION, TOOL_CALL),
    END_TOOL_CALL: (TOOL_CALL,),
}
"""The tags that may end a value, each with the tags that may follow it; the end of the output may always follow."""


class ParameterValue:
    """The value of a parameter while it is read. One line break at the start and one at the end are markup.

    If text follows a ``</parameter>``, the tag is part of the value if a further ``</parameter>`` comes before the end
    of the value. Otherwise the tag closed the value, and the text is noise between two parameters. Until this is
    decided, the tag and the text are held back.

    Attributes:
        name: name of the parameter; None if the value is to be dropped.
        parameter: values that the schema allows.
        candidate: tag that may end the value; empty if there is none.
    """

    def __init__(self, name: str | None, parameter: Parameter) -> None:
        self.name = name
        self.parameter = parameter
        self.candidate: str = ""
        self._held: list[str] = []
        """The candidate and the text after it."""
        self._space = False
        """Whether a line break follows the candidate in the held text."""
        self._after: list[str] = []
        """A ``</parameter>`` that may have closed the value, and the text after it."""
        self._pieces: list[str] = []
        self._begun = False
        self._break = ""
        """The line break before the value, of one or two characters; empty if there is none."""
        self._tail = ""
        """The line break at the end, or its beginning, which may be markup."""

    @property
    def streams(self) -> bool:
        """Whether the value is a string, whose pieces can be output immediately."""
        return self.name is not None and self.parameter.kinds == STRING

    @property
    def closed(self) -> bool:
        """Whether text followed a closing tag, so that the value ends at the tag unless a further tag follows."""
        return bool(self._after)

    def append(self, text: str) -> str:
        """Append text, or hold it back if the value may be closed; return the part that belongs to the value."""
        if not self._after:
            return self._add(text)
        if text:
            self._after.append(text)
        return ""

    def close(self) -> str:
        """End the value and return its last part, which was held back."""
        rest = "" if self._tail == (self._break or "\n") else self._tail
        self._tail = ""
        self._pieces.append(rest)
        return rest

    def text(self) -> str:
        """Return the value read so far."""
        return "".join(self._pieces)

    def may_begin_end(self, tag: str) -> bool:
        """Tell whether ``tag`` may end the value here."""
        if tag == PARAMETER:
            return self.closed or self._after_line_break() or (self.name is None and self._at_line_start())
        return tag in MAY_FOLLOW

    def begin_end(self, segment: Segment) -> None:
        """Hold back a tag that may end the value."""
        self.candidate = segment.tag
        self._held = [segment.text or segment.tag]
        self._space = False

    def hold(self, text: str) -> None:
        """Append text to the held text after the tag."""
        self._held.append(text)
        self._space = self._space or "\n" in text

    def held_text(self) -> str:
        """Return the tag that may end the value, and the text after it."""
        return "".join(self._held)

    def may_end(self) -> bool:
        """Tell whether the held tag has a line break before or after it, as a tag at the end of a value does."""
        return self._space or not self._break or self._at_line_start()

    def release(self) -> str:
        """Append the held text, whose tag did not end the value; return the part that belongs to the value."""
        held, closed = self.held_text(), self.candidate == END_PARAMETER and self.may_end()
        self._held, self.candidate = [], ""
        if closed:
            self._after = [held]
            return ""
        return self.append(held)

    def reopen(self) -> str:
        """Append everything since the tag that seemed to close the value, because a further closing tag follows."""
        after, self._after = "".join(self._after), []
        return self._add(after)

    def _add(self, text: str) -> str:
        text, self._tail = self._tail + text, ""
        if not self._begun:
            if text in ("", "\r"):
                self._tail = text
                return ""
            self._begun = True
            self._break = next((mark for mark in ("\n", "\r\n") if text.startswith(mark)), "")
            text = text.removeprefix(self._break)
        mark = self._break or "\n"
        self._tail = next((end for end in (mark, mark[:-1]) if end and text.endswith(end)), "")
        text = text.removesuffix(self._tail)
        if text:
            self._pieces.append(text)
        return text

    def _after_line_break(self) -> bool:
        return self._after[-1].endswith("\n") if self._after else self._tail == (self._break or "\n")

    def _at_line_start(self) -> bool:
        empty = not (self._after or self._pieces or self._tail)
        return self._after_line_break() or (empty and bool(self._break))
