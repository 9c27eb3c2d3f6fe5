"""Parallel positioned reads into one buffer, through the page cache of the operating system."""

from collections.abc import Mapping
from typing import ClassVar

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.limits import CHUNK_MIB, SLOTS, THREADS, Limit
from flashmoe_mlx.stores.reading_store import ReadingStore
from flashmoe_mlx.stores.thread_reader import ThreadReader


class PreadStore(ReadingStore):
    """A store that reads every requested expert with several threads, straight into its slot.

    Args:
        source: the location of the experts.
        slots: maximum number of distinct experts in one fetch.
        threads: number of threads, each of which makes one read at a time.
        chunk_mib: maximum size of one read in MiB, so that several threads share an expert; None reads whole experts.
        direct: whether reads bypass the page cache (O_DIRECT on Linux, F_NOCACHE on macOS).
        readahead: whether the system may read beyond the requested bytes.
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
