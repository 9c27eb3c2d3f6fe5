"""What reads experts into memory, and the ways of reading that stores can be told to use by name."""

from collections.abc import Sequence
from typing import Protocol

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.expert_store import ExpertSource
from flashmoe_mlx.storage.thread_reader import ThreadReader
from flashmoe_mlx.storage.uring_reader import UringReader


class ExpertReader(Protocol):
    """Reads experts of one source into memory that the caller owns."""

    def read(self, layer: int, wanted: Sequence[tuple[int, memoryview]]) -> tuple[int, int]:
        """Fill the row of each (expert, row); the number of reads and of bytes.

        Whatever happens, no row is written to any more when this returns.

        Raises:
            ExpertReadError: an expert could not be read.
        """
        ...

    def close(self) -> None:
        """Free what it reads with; no read may be under way. May be called again."""
        ...


READERS = ("io_uring", "pread")


def make_reader(name: str, source: ExpertSource, depth: int, direct: bool = False) -> ExpertReader:
    """The reader called ``name``, with ``depth`` reads under way at once; ``direct`` ones go past the page cache.

    Raises:
        InputError: there is no such reader, ``depth`` is less than 1, or the source is not aligned for direct reads.
        BackendUnavailableError: this machine has no such thing.
    """
    if name not in READERS:
        raise InputError(f"reader={name}: no such reader; there are {', '.join(READERS)}")
    if depth < 1:
        raise InputError(f"depth={depth}: at least 1 read must be under way")
    if name == "io_uring":
        return UringReader(source, depth, direct=direct)
    return ThreadReader(source, depth, direct=direct)
