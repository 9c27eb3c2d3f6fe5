"""Output of tasks to stderr; stdout is reserved for the answer.

Text is printed literally: paths, errors and text from a model may contain brackets and colons, which rich would
interpret as markup and emoji.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, cast

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from flashmoe_mlx.console.streams import Notes

__all__ = [
    "ByteProgress",
    "activity",
    "byte_progress",
    "console",
    "counted",
    "literal_console",
    "print_notes",
    "print_table",
    "show",
]

_STDERR = cast(IO[str], Notes())
_MAX_TABLE_WIDTH = 400


def literal_console(file: IO[str] | None = None, width: int | None = None) -> Console:
    """Return a console that prints text literally, to stdout unless ``file`` is given."""
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)


console: Console = literal_console(_STDERR)
"""The console for progress and notes, on stderr."""


def counted(number: int, noun: str) -> str:
    """Return ``number`` and ``noun``, with an "s" unless the number is 1, as in "1 round" and "2 rounds"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def show(line: str = "") -> None:
    """Print a line literally and without line breaks of rich."""
    console.print(line, soft_wrap=True)


@contextmanager
def activity() -> Iterator[Callable[[str], None]]:
    """Show the current activity while the block runs; yield a function that sets its description.

    Nothing appears before the first description.
    """
    status = console.status(Text())

    def announce(line: str) -> None:
        status.update(Text(line))
        status.start()

    try:
        yield announce
    finally:
        status.stop()


def print_table(table: Table) -> None:
    """Print a table without truncated numbers; in a terminal that is too narrow, exchange its rows and columns."""
    needed = _width(table)
    if console.is_terminal and needed > console.width:
        exchanged = _exchanged(table)
        if _width(exchanged) <= console.width:
            table = exchanged
    literal_console(_STDERR, width=max(needed, console.width)).print(table)


def _width(table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=_MAX_TABLE_WIDTH), table).maximum


def _exchanged(table: Table) -> Table:
    """Return a table whose columns are the rows of ``table``."""
    labels, *columns = table.columns
    found = Table(title=table.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    found.add_column(labels.header, no_wrap=True)
    for label in labels.cells:
        found.add_column(label, justify="right", no_wrap=True)
    for column in columns:
        found.add_row(column.header, *column.cells)
    return found


def print_notes(notes: Iterable[str | None], prefix: str = "note: ") -> None:
    """Print each distinct note once, such as the note of an engine's setup."""
    for note in dict.fromkeys(filter(None, notes)):
        show(f"{prefix}{note}")


class ByteProgress:
    """Progress bar in bytes; implements ``pack.progress.Progress``."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def stage(self, description: str, total: int) -> None:
        """Begin a stage of ``total`` bytes; the first stage makes the bar appear."""
        self._bar.start()
        self._bar.reset(self._task, total=total, description=description)

    def advance(self, nbytes: int) -> None:
        """Report the progress of another ``nbytes`` bytes."""
        self._bar.advance(self._task, nbytes)


@contextmanager
def byte_progress() -> Iterator[ByteProgress]:
    """Show a progress bar until the block ends."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True)
    try:
        yield ByteProgress(bar)
    finally:
        if bar.live.is_started:
            bar.stop()
