"""The interface of readers, which read experts into memory, and a function that creates a reader by name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.limits import THREADS
from flashmoe_mlx.stores.thread_reader import ThreadReader
from flashmoe_mlx.stores.uring_reader import UringReader

__all__ = ["READERS", "ExpertReader", "make_reader"]


class ExpertReader(Protocol):
    """A reader of the experts of one source, into memory of the caller."""

    def read(
        self,
        layer: int,
        wanted: Sequence[tuple[int, memoryview]],
        arrived: Callable[[Sequence[int]], None] | None = None,
        begun: Callable[[], None] | None = None,
        done: Mapping[int, int] | None = None,
    ) -> tuple[int, int]:
        """Read ``wanted``, pairs of an expert and its row in memory; return the numbers of reads and bytes.

        After this method returns or raises an error, it writes nothing to the rows.

        Args:
            layer: a valid layer.
            wanted: the experts and their rows.
            arrived: called, in the thread of the caller, with experts whose rows are complete.
            begun: called first, in the thread of the caller, as soon as reads are under way.
            done: the bytes at the beginning of the records of some experts that need no read.

        Raises:
            ExpertReadError: an expert could not be read.
            ExpertStoreError: no read failed, but fewer bytes arrived than were requested (code "lost_read").
        """
        ...

    def close(self) -> None:
        """Free threads and descriptors; no read may be running. Later calls have no effect."""
        ...


READERS = ("io_uring", "pread")
"""The names that ``make_reader`` accepts."""


def make_reader(name: str, source: ExpertSource, depth: int, direct: bool = False) -> ExpertReader:
    """Create a reader.

    Args:
        name: "io_uring" or "pread".
        source: the location of the experts.
        depth: number of simultaneous reads.
        direct: whether reads bypass the page cache.

    Raises:
        InputError: there is no such reader (code "unknown_reader"), ``depth`` is out of range
            ("option_out_of_range"), or the source is not aligned for direct reads ("not_aligned").
        BackendUnavailableError: this machine cannot run the reader.
    """
    if name not in READERS:
        raise InputError(
            f"backend.reader={name}: no such reader; there are {', '.join(READERS)}", code="unknown_reader"
        )
    if name == "io_uring":
        return UringReader(source, depth, direct=direct)
    THREADS.check("depth", depth)  # each simultaneous read needs a thread
    return ThreadReader(source, depth, direct=direct)
