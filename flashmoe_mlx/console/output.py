"""What tasks show while they work: on stderr, so that stdout holds the answer alone.

Everything is shown as it stands: paths, errors and the words of a model may hold brackets and colons, which rich would
take for markup and emoji.
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

_STDERR = cast(IO[str], Notes())
_WIDEST = 400


def literal_console(file: IO[str] | None = None, width: int | None = None) -> Console:
    """Return a console that shows texts as they stand; on stdout unless ``file`` is given."""
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)


console = literal_console(_STDERR)


def show(line: str = "") -> None:
    """Print a line as it stands; a long one is not broken."""
    console.print(line, soft_wrap=True)


@contextmanager
def activity() -> Iterator[Callable[[str], None]]:
    """Show what is being done while the block runs; yields the function that says it."""
    with console.status(Text()) as status:
        yield lambda line: status.update(Text(line))


def print_table(table: Table) -> None:
    """Show a table whole: a line that the terminal breaks is better than digits left out."""
    needed = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    literal_console(_STDERR, width=max(needed, console.width)).print(table)


def print_notes(notes: Iterable[str | None], prefix: str = "note: ") -> None:
    """Show each different note, such as that of an engine's setup, once."""
    for note in dict.fromkeys(filter(None, notes)):
        show(f"{prefix}{note}")


class ByteProgress:
    """A progress bar in bytes; implements ``pack.progress.Progress``."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def stage(self, description: str, total: int) -> None:
        """Begin a new stage; the bar shows itself with the first."""
        self._bar.start()
        self._bar.reset(self._task, total=total, description=description)

    def advance(self, nbytes: int) -> None:
        """Report that ``nbytes`` more are done."""
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
