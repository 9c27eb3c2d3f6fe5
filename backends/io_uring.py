"""Linux's io_uring: the reads of a layer in one system call."""

from collections.abc import Mapping
from typing import ClassVar

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.limits import CHUNK_MIB, DEPTH, SLOTS, Limit
from flashmoe_mlx.stores.reading_store import ReadingStore
from flashmoe_mlx.stores.uring_reader import UringReader


class UringStore(ReadingStore):
    """Reads every requested expert through one ring, without threads; threads read only the hints.

    Options: ``slots`` of one fetch; ``depth`` reads under way at once; ``chunk_mib`` MiB at most in one read (None:
    whole experts); ``direct`` reads past the page cache (O_DIRECT); ``workers`` has the kernel's own threads make the
    reads, which matters where pages are in the cache and must be copied; ``registered`` pins the slots once, twice as
    many from the start, so that hints need no others.

    Raises:
        BackendUnavailableError: not Linux, an old kernel, or io_uring is forbidden here.
    """

    limits: ClassVar[Mapping[str, Limit]] = {"slots": SLOTS, "depth": DEPTH, "chunk_mib": CHUNK_MIB}

    def __init__(
        self,
        source: ExpertSource,
        slots: int = 16,
        depth: int = 64,
        chunk_mib: float | None = None,
        direct: bool = True,
        workers: bool = False,
        registered: bool = False,
    ) -> None:
        super().__init__(
            source,
            slots,
            lambda slab: UringReader(source, depth, chunk_mib, direct, workers, slab if registered else None),
            depth,
            direct,
            keep_slab=registered,
        )
