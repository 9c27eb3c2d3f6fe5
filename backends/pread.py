"""Parallel positioned reads into one buffer, through the operating system's page cache."""

from collections.abc import Mapping
from typing import ClassVar

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.limits import CHUNK_MIB, SLOTS, THREADS, Limit
from flashmoe_mlx.stores.reading_store import ReadingStore
from flashmoe_mlx.stores.thread_reader import ThreadReader


class PreadStore(ReadingStore):
    """Reads every requested expert with ``threads`` threads, straight into its slot.

    Options: ``slots`` of one fetch; ``threads`` that read at once; ``chunk_mib`` MiB at most in one read, so that
    several threads share an expert (None: whole experts); ``direct`` reads past the page cache (O_DIRECT on Linux,
    F_NOCACHE on macOS); ``readahead`` false tells the system not to read beyond what is asked for.
    """

    limits: ClassVar[Mapping[str, Limit]] = {"slots": SLOTS, "threads": THREADS, "chunk_mib": CHUNK_MIB}

    def __init__(
        self,
        source: ExpertSource,
        slots: int = 16,
        threads: int = 4,
        chunk_mib: float | None = None,
        direct: bool = False,
        readahead: bool = True,
    ) -> None:
        super().__init__(
            source, slots, lambda _: ThreadReader(source, threads, chunk_mib, direct, readahead), threads, direct
        )
