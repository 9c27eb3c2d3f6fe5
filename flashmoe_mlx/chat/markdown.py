"""Markdown that arrives in pieces, as blocks that are complete and can be printed for good."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from markdown_it import MarkdownIt
from rich.console import Group, RenderableType
from rich.markdown import Markdown
from rich.syntax import Syntax
from rich.text import Text

_FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})[ \t]*([^`]*?)\s*$")
_ITEM = re.compile(r"^(?:[-*+]|\d{1,9}[.)])(?:\s|$)")
_SINGLE = re.compile(r"^(?:#{1,6}(?:\s|$)|(?:\*\s*){3,}$|(?:-\s*){3,}$|(?:_\s*){3,}$)")
_QUOTE = re.compile(r"^>")
_TABLE_LINE = re.compile(r"^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)+\|?\s*$")
_UNDECIDED = re.compile(r"^[-=#*_~`+>|\s]+$|[*_~`]+$")
"""Marks at the end of an unfinished line; the next character decides their meaning: ``*`` may become ``**``."""
_CODE_LINES = 16
"""Number of lines of code after which they are printed, while the rest of the block may still come."""
_THEME = "ansi_dark"


@dataclass(frozen=True)
class Block:
    """A part of an answer that is rendered by itself.

    Attributes:
        text: the source.
        language: the text after the marks of a code block, which begins with its language; None for other blocks.
        opens: whether the part is the first one of a code block.
        closes: whether the part is the last one of a code block.
    """

    text: str
    language: str | None = None
    opens: bool = False
    closes: bool = False

    def render(self) -> RenderableType:
        """Return the block for a console; raw HTML and line breaks appear as they are written."""
        if self.language is None:
            return Text() if not self.text.strip() else _Answer(self.text.rstrip("\n"))
        fence = Text("```", "dim")
        parts: list[RenderableType] = [Text(f"```{self.language}", "dim")] if self.opens else []
        if self.text:
            lexer = (self.language.split() or ["text"])[0]
            code = self.text.removesuffix("\n")
            parts.append(Syntax(code, lexer, theme=_THEME, background_color="default", word_wrap=True))
        return Group(*parts, *([fence] if self.closes else []))

    @property
    def is_table(self) -> bool:
        """Whether the block is a table, whose columns change with each row."""
        lines = self.text.split("\n", 2)
        return self.language is None and len(lines) > 1 and _TABLE_LINE.match(lines[1]) is not None


class _Answer(Markdown):
    """Markdown of a model: HTML is text, addresses of links are shown, and line breaks are kept."""

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme=_THEME, inline_code_theme=_THEME, hyperlinks=False)
        self.parsed = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


class BlockReader:
    """A reader that divides an answer into blocks while it arrives.

    A block ends where rendering the rest cannot change it: at a blank line unless an indented line follows, before and
    after headings, before items of lists, and at the end of code. Long code is divided into parts.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        """The complete lines of the open block."""
        self._partial = ""
        """The last line, without its end."""
        self._fence: tuple[str, str, int] | None = None
        """The marks and the language of the open code block, and its indentation."""
        self._shown_code = False
        """Whether a part of the open code block was returned."""
        self._inner = ""
        """The marks of a code block inside the open block, such as code in an item of a list."""

    def add(self, text: str) -> list[Block]:
        """Add text; return the blocks that it completed."""
        *complete, self._partial = (self._partial + text).split("\n")
        return [block for line in complete for block in self._read(line)]

    @property
    def open(self) -> Block | None:
        """The block that is not complete, without marks of undecided meaning; None if there is no text."""
        partial = self._partial
        if self._fence is None or not partial.strip().strip(self._fence[0][0]):
            partial = _UNDECIDED.sub("", partial)
        lines = [*self._lines, *([partial] if partial else [])]
        if self._fence is not None:
            return Block("\n".join(lines), self._fence[1], opens=not self._shown_code)
        found = _FENCE.match(self._partial) if not self._lines else None
        if found is not None and not found[1]:
            return Block("", found[3], opens=True)
        return Block("\n".join(lines)) if lines else None

    def finish(self) -> list[Block]:
        """End the text; return the remaining blocks."""
        blocks = self.add("\n") if self._partial else []
        if self._fence is not None:
            blocks.append(self._take_code(closes=False))
            self._fence = None
        return blocks + list(self._take())

    def _take(self) -> Iterator[Block]:
        lines, self._lines, self._inner = self._lines, [], ""
        if lines:
            yield Block("\n".join(lines) + "\n")

    def _take_code(self, closes: bool) -> Block:
        assert self._fence is not None
        text = "".join(f"{line}\n" for line in self._lines)
        block = Block(text, self._fence[1], opens=not self._shown_code, closes=closes)
        self._lines, self._shown_code = [], not closes
        return block

    def _read(self, line: str) -> Iterator[Block]:
        if self._fence is not None:
            yield from self._read_code(line)
            return
        found = _FENCE.match(line)
        if self._inner:
            if found is not None and not found[3] and line.strip().startswith(self._inner):
                self._inner = ""
            self._lines.append(line)
        elif found is not None and not (found[1] and self._lines):
            yield from self._take()
            self._fence, self._shown_code = (found[2], found[3], len(found[1])), False
        elif found is not None:
            self._inner = found[2]
            self._lines.append(line)
        elif not line.strip():
            self._lines.append("")
        elif self._begins_block(line):
            yield from self._take()
            self._lines.append(line)
            if _SINGLE.match(line):
                yield from self._take()
        else:
            self._lines.append(line)

    def _begins_block(self, line: str) -> bool:
        """Return whether ``line`` is the first one of a new block."""
        if not self._lines or line[0] in " \t":
            return False
        setext = _SINGLE.match(line) and line.startswith("-") and self._lines[-1].strip()
        if setext and "-" * len(line.strip()) == line.strip():
            return False  # the line below a heading
        quoted = _QUOTE.match(self._lines[0]) is not None
        return (
            not self._lines[-1]
            or _ITEM.match(line) is not None
            or _SINGLE.match(line) is not None
            or (_QUOTE.match(line) is not None and not quoted)
        )

    def _read_code(self, line: str) -> Iterator[Block]:
        assert self._fence is not None
        marks, _, indent = self._fence
        stripped = line.strip()
        if stripped.startswith(marks) and not stripped.strip(marks[0]):
            yield self._take_code(closes=True)
            self._fence, self._shown_code = None, False
            return
        self._lines.append(line[min(indent, len(line) - len(line.lstrip())) :])
        if len(self._lines) >= _CODE_LINES:
            yield self._take_code(closes=False)
