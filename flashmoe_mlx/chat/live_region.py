"""Lines at the bottom of a terminal that are redrawn in place, below text that stays."""

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.control import Control
from rich.segment import ControlType, Segment, SegmentLines

Line = list[Segment]


class LiveRegion:
    """The redrawn lines of a terminal.

    ``rich.live`` counts the lines to erase by the width at which it drew them, so that a narrower window leaves copies
    of lines behind. This class counts by the current width.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._widths: list[int] = []
        """The widths in cells of the lines on the screen."""

    def draw(self, lines: Sequence[Line]) -> None:
        """Replace the lines, of which the last ones that fit on the screen are shown."""
        shown = lines[-max(1, self._console.height - 1) :]
        with self._console:  # one write, which does not flicker
            self._erase()
            self._console.print(SegmentLines(_joined(shown)), end="", soft_wrap=True)
        self._widths = [Segment.get_line_length(line) for line in shown]

    def print(self, *texts: RenderableType) -> None:
        """Print ``texts`` for good in place of the lines."""
        with self._console:
            self._erase()
            for text in texts:
                self._console.print(text, end="" if isinstance(text, SegmentLines) else "\n")

    def clear(self) -> None:
        """Remove the lines."""
        with self._console:
            self._erase()

    def _erase(self) -> None:
        width = max(1, self._console.width)
        rows = sum(max(1, -(-cells // width)) for cells in self._widths)
        self._widths = []
        if not rows:
            return
        codes: list[tuple[ControlType, int] | ControlType] = [ControlType.CARRIAGE_RETURN]
        for row in range(rows):
            codes += [(ControlType.CURSOR_UP, 1)] if row else []
            codes += [(ControlType.ERASE_IN_LINE, 2)]
        self._console.control(Control(*codes))


def _joined(lines: Sequence[Line]) -> list[Line]:
    """Return ``lines`` with line breaks between them, and none at the end."""
    return [[*line, Segment.line()] for line in lines[:-1]] + list(lines[-1:])
