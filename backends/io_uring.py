"""Reads through io_uring on Linux: one system call for all experts of a fetch."""

from collections.abc import Mapping
from typing import ClassVar

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.limits import CHUNK_MIB, DEPTH, SLOTS, Limit
from flashmoe_mlx.stores.reading_store import ReadingStore
from flashmoe_mlx.stores.uring_reader import UringReader


class UringStore(ReadingStore):
    """A store that reads every requested expert through one ring; threads read only hinted experts.

    Args:
        source: the location of the experts.
        slots: maximum number of distinct experts in one fetch.
        depth: maximum number of simultaneous reads.
        chunk_mib: maximum size of one read in MiB; None reads whole experts.
        direct: whether reads bypass the page cache (O_DIRECT).
        workers: whether threads of the kernel make the reads. They help where the page cache holds the experts, which
            must then be copied.
        registered: whether the kernel pins the slots once. There are then twice as many slots from the start, so that
            hinted experts need no new slots.

    Raises:
        BackendUnavailableError: the system is not Linux, its kernel is too old, or it forbids io_uring
            (code "no_io_uring"); or the slots cannot be pinned ("cannot_pin").
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
