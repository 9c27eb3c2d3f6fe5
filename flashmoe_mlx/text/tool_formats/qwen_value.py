"""The tags of Qwen's calls, and a parameter's value between them."""

from flashmoe_mlx.text.tags import END_TOOL_CALL, TOOL_CALL, Segment
from flashmoe_mlx.text.tool_formats.schemas import STRING, Parameter

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
MAY_FOLLOW = {
    END_PARAMETER: (PARAMETER, END_FUNCTION, END_TOOL_CALL, FUNCTION, TOOL_CALL),
    END_FUNCTION: (END_TOOL_CALL, FUNCTION, TOOL_CALL),
    END_TOOL_CALL: (TOOL_CALL,),
}
"""The tags that may end a value, each with those of which one must come next; the end of the output may, too."""


class Value:
    """A parameter's value as it comes; exactly one line break at either side is markup.

    A closing tag that something else follows belongs to the value if another ``</parameter>`` comes before the value
    ends. Otherwise it closed the value, and the rest was noise between two parameters. Until that is known, the text
    since the tag is held back.
    """

    def __init__(self, name: str | None, parameter: Parameter) -> None:
        self.name = name
        """None for a value that is dropped."""
        self.parameter = parameter
        self.candidate = ""
        """The tag that may end the value."""
        self._held: list[str] = []
        """The candidate and the text since."""
        self._space = False
        """The held text has a line break after the tag."""
        self._after: list[str] = []
        """A ``</parameter>`` that may have closed the value, and the text since."""
        self._pieces: list[str] = []
        self._begun = False
        self._break = ""
        """The line break before the value, of one character or two; empty if there is none."""
        self._tail = ""
        """A line break at the end, which may be markup, or the beginning of one."""

    @property
    def streams(self) -> bool:
        """Whether the value is a string, so that its pieces can be passed on at once."""
        return self.name is not None and self.parameter.kinds == STRING

    @property
    def closed(self) -> bool:
        """Whether a closing tag and other text came, so that the value ends at the tag unless another one comes."""
        return bool(self._after)

    def keep(self, text: str) -> str:
        """Add text, unless the value may be closed; returns what is certain to belong to it."""
        if not self._after:
            return self._add(text)
        if text:
            self._after.append(text)
        return ""

    def close(self) -> str:
        """End the value; returns the end of it that was held back."""
        rest = "" if self._tail == (self._break or "\n") else self._tail
        self._tail = ""
        self._pieces.append(rest)
        return rest

    def text(self) -> str:
        """Return the value so far."""
        return "".join(self._pieces)

    def may_begin_end(self, tag: str) -> bool:
        """Tell whether ``tag`` may end the value here."""
        if tag == PARAMETER:
            return self.closed or self._after_line_break() or (self.name is None and self._at_line_start())
        return tag in MAY_FOLLOW

    def begin_end(self, segment: Segment) -> None:
        """Take a tag that may end the value."""
        self.candidate = segment.tag
        self._held = [segment.text or segment.tag]
        self._space = False

    def hold(self, text: str) -> None:
        """Add text to what is held since the tag."""
        self._held.append(text)
        self._space = self._space or "\n" in text

    def held(self) -> str:
        """Return the tag that may end the value, and the text since."""
        return "".join(self._held)

    def may_end(self) -> bool:
        """Tell whether the tag stands as one does that ends a value: with a line break before or after it."""
        return self._space or not self._break or self._at_line_start()

    def release(self) -> str:
        """Keep the text held since the tag, which did not end the value; returns what is certain to belong to it."""
        held, closed = self.held(), self.candidate == END_PARAMETER and self.may_end()
        self._held, self.candidate = [], ""
        if closed:
            self._after = [held]
            return ""
        return self.keep(held)

    def reopen(self) -> str:
        """Add everything since the tag that seemed to close the value, as another one does."""
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
        nothing = not (self._after or self._pieces or self._tail)
        return self._after_line_break() or (nothing and bool(self._break))
