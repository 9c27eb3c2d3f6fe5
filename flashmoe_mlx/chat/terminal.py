"""The output of a chat on a terminal: rendered Markdown, dimmed thinking, and a status that changes in place."""

import time

from rich.console import Console, RenderableType
from rich.segment import SegmentLines
from rich.text import Text

from flashmoe_mlx.chat.live_region import Line, LiveRegion
from flashmoe_mlx.chat.markdown import Block, BlockReader
from flashmoe_mlx.chat.status import Status
from flashmoe_mlx.console.output import literal_console
from flashmoe_mlx.console.streams import neutralize

_WIDEST = 120
"""Largest width in cells of rendered text; longer lines are hard to read."""
_THOUGHT_LINES = 6
"""Number of lines of folded thinking that are shown while it arrives."""
_SHORTEST_INTERVAL = 0.03
"""Shortest time in seconds between two redraws."""
_SHARE = 5.0
"""Multiple of the time of a redraw that passes before the next one, so that drawing does not slow the model."""


class TerminalScreen:
    """Output to a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console: Console = console or literal_console()

    def note(self, text: str) -> None:
        """Show a note of the program."""
        self.console.print(neutralize(text))

    def quote(self, text: str) -> None:
        """Show text from elsewhere, dimmed."""
        self.console.print(Text(neutralize(text), "dim"))

    def answer(self, folded: bool) -> "TerminalAnswer":
        """Begin an answer."""
        return TerminalAnswer(self.console, folded)


class TerminalAnswer:
    """One answer on a terminal.

    Complete blocks are printed for good and scroll away like any output. Below them, the open block and the status are
    redrawn in place.
    """

    def __init__(self, console: Console, folded: bool) -> None:
        self._console = console
        self._folded = folded
        self._region = LiveRegion(console)
        self._reader = BlockReader()
        self._thinking = ""
        """Thinking, or its last line if it is not folded."""
        self._thought_from: float | None = None
        self._status: Status | None = None
        self._gap = False
        """Whether an empty line separates the latest block from the next one."""
        self._next_draw = 0.0
        console.show_cursor(False)

    def think(self, text: str) -> None:
        """Show thinking, dimmed."""
        if self._thought_from is None:
            self._thought_from = time.monotonic()
        self._thinking += neutralize(text)
        if not self._folded:
            *complete, self._thinking = self._thinking.split("\n")
            if complete:
                self._region.print(*(Text(line, "dim") for line in complete))
        self._draw()

    def write(self, text: str) -> None:
        """Show a part of the answer."""
        self._end_thinking()
        self._print(self._reader.add(neutralize(text)))
        self._draw()

    def show_status(self, status: Status) -> None:
        """Show the current figures."""
        self._status = status
        self._draw()

    def close(self) -> None:
        """Print the rest for good; remove the status."""
        self._end_thinking()
        self._print(self._reader.finish())
        self._region.clear()
        self._console.show_cursor(True)

    def _end_thinking(self) -> None:
        if self._thought_from is None:
            return
        seconds = time.monotonic() - self._thought_from
        self._thought_from = None
        if self._folded:
            self._region.print(Text(f"thought for {seconds:.1f} s; /thoughts shows it", "dim italic"))
        else:
            self._region.print(Text(self._thinking, "dim"), Text())
        self._thinking = ""

    def _print(self, blocks: list[Block]) -> None:
        texts: list[RenderableType] = []
        for block in blocks:
            empty = block.language is None and not block.text.strip()
            if not empty:
                texts += [Text()] * self._gap
                texts.append(SegmentLines(self._lines(block.render(), self._text_width), new_lines=True))
            self._gap = block.language is None and (empty or block.text.endswith("\n\n"))
        if texts:
            self._region.print(*texts)
            self._next_draw = 0.0

    def _draw(self) -> None:
        now = time.monotonic()
        if now < self._next_draw:
            return
        width = max(1, self._console.width - 1)
        lines = self._open_lines(width)
        if self._status is not None:
            lines.append(self._lines(Text(self._status.line(width), "dim"), width)[0])
        self._region.draw(lines)
        self._next_draw = now + max(_SHORTEST_INTERVAL, _SHARE * (time.monotonic() - now))

    def _open_lines(self, width: int) -> list[Line]:
        """Return the last lines of the text that is not complete."""
        most = max(1, self._console.height - 3)
        if self._thought_from is not None:
            lines = self._lines(Text(self._thinking, "dim"), width)
            return lines[-min(most, _THOUGHT_LINES) :] if self._folded else lines[-most:]
        block = self._reader.open
        if block is None:
            return []
        shown = Text(block.text, "dim") if block.is_table else block.render()
        gap: list[Line] = [[]] if self._gap else []
        return (gap + self._lines(shown, self._text_width))[-most:]

    @property
    def _text_width(self) -> int:
        return max(1, min(self._console.width - 1, _WIDEST))

    def _lines(self, text: RenderableType, width: int) -> list[Line]:
        return self._console.render_lines(text, self._console.options.update(width=width, height=None), pad=False)
