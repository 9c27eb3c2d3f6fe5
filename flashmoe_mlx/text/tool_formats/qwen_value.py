"""The tags of Qwen's calls, and a parameter's value between them."""

from flashmoe_mlx.text.tags import END_TOOL_CALL, TOOL_CALL, Segment
from flashmoe_mlx.text.tool_formats.schemas import Kinds

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
MAY_FOLLOW = {
    END_PARAMETER: (PARAMETER, END_FUNCTION, END_TOOL_CALL, FUNCTION, TOOL_CALL),
    END_FUNCTION: (END_TOOL_CALL, FUNCTION, TOOL_CALL),
    END_TOOL_CALL: (TOOL_CALL,),
}
"""The tags that may end a value, each with those of which one must come next; the end of the output may, too."""


class Value:
    """A parameter's value as it comes; exactly one newline at either side is markup."""

    def __init__(self, name: str | None, kinds: Kinds) -> None:
        self.name = name
        """None for a value that is dropped."""
        self.kinds = kinds
        self.candidate = ""
        """The tag that may end the value."""
        self._held: list[str] = []
        self._space = False
        """The held text has a newline after the tag."""
        self._pieces: list[str] = []
        self._begun = self._on_own_line = False
        """Whether text came; whether the first was a newline, as the template has it."""
        self._newline = False
        """A newline at the end, which may be markup."""

    def add(self, text: str) -> str:
        """Add text; returns what is certain to belong to the value."""
        if text and not self._begun:
            self._begun = True
            self._on_own_line = text.startswith("\n")
            text = text.removeprefix("\n")
        if not text:
            return ""
        text = "\n" * self._newline + text
        self._newline = text.endswith("\n")
        if self._newline:
            text = text[:-1]
        self._pieces.append(text)
        return text

    def text(self) -> str:
        return "".join(self._pieces)

    def _at_line_start(self) -> bool:
        return self._newline or (self._on_own_line and not any(self._pieces))

    def may_begin_end(self, tag: str) -> bool:
        """Tell whether ``tag`` may end the value here."""
        if tag == PARAMETER:
            return self._newline or (self.name is None and self._at_line_start())
        return tag in MAY_FOLLOW

    def begin_end(self, segment: Segment) -> None:
        self.candidate = segment.tag
        self._held = [segment.text or segment.tag]
        self._space = False

    def hold(self, text: str) -> None:
        self._held.append(text)
        self._space = self._space or "\n" in text

    def may_end(self) -> bool:
        """Tell whether the tag stands as one does that ends a value: with a newline before or after it."""
        return self._space or not self._on_own_line or self._at_line_start()

    def release(self) -> str:
        """Return the text held since the tag, which did not end the value."""
        held, self._held, self.candidate = self._held, [], ""
        return "".join(held)
