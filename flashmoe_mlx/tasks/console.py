"""What tasks show while they work: on stderr, so that stdout holds the answer alone."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

console = Console(stderr=True)
_WIDEST = 400


def print_table(table: Table) -> None:
    """Show a table whole: a line that the terminal breaks is better than digits left out."""
    needed = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    Console(stderr=True, width=max(needed, console.width)).print(table)


def print_notes(notes: Iterable[str | None], prefix: str = "note: ") -> None:
    """Show each different note, such as that of an engine's setup, once."""
    for note in dict.fromkeys(filter(None, notes)):
        console.print(f"{prefix}{note}", highlight=False, markup=False, soft_wrap=True)


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
        """Move on."""
        self._bar.advance(self._task, nbytes)


@contextmanager
def byte_progress() -> Iterator[ByteProgress]:
    """A bar that is gone when the work is done."""
    columns = (
        TextColumn("{task.description}"),
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
