"""The interface of readers of experts, and their choice by name."""

from collections.abc import Sequence
from typing import Protocol

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.limits import THREADS
from flashmoe_mlx.stores.thread_reader import ThreadReader
from flashmoe_mlx.stores.uring_reader import UringReader


class ExpertReader(Protocol):
    """Reads experts of one source into memory that the caller owns."""

    def read(self, layer: int, wanted: Sequence[tuple[int, memoryview]]) -> tuple[int, int]:
        """Fill the row of each (expert, row); return the numbers of reads and of bytes, all of them as planned.

        Whatever happens, no row is written to any more when this returns.

        Raises:
            ExpertReadError: an expert could not be read.
            ExpertStoreError: fewer bytes were read than planned, though nothing failed.
        """
        ...

    def close(self) -> None:
        """Free threads and descriptors; no read may be running. May be called again."""
        ...


READERS = ("io_uring", "pread")


def make_reader(name: str, source: ExpertSource, depth: int, direct: bool = False) -> ExpertReader:
    """Open the reader called ``name``, with ``depth`` reads under way at once, ``direct`` ones past the page cache.

    Raises:
        InputError: there is no such reader, it cannot have ``depth`` reads under way, or the source is not aligned for
            direct reads.
        BackendUnavailableError: this machine has no such reader.
    """
    if name not in READERS:
        raise InputError(
            f"backend.reader={name}: no such reader; there are {', '.join(READERS)}", code="unknown_reader"
        )
    if name == "io_uring":
        return UringReader(source, depth, direct=direct)
    THREADS.check("depth", depth)  # a thread each
    return ThreadReader(source, depth, direct=direct)
