"""The 2-bit variant of a pack, whose records have little more than half the bytes of the 4-bit variant."""

from collections.abc import Mapping
from typing import ClassVar

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.limits import DEPTH, SLOTS, Limit
from flashmoe_mlx.stores.readers import make_reader
from flashmoe_mlx.stores.reading_store import ReadingStore


class Pack2Store(ReadingStore):
    """A store that reads experts of 2 bits and refuses any other width.

    Args:
        source: the location of the experts.
        slots: maximum number of distinct experts in one fetch.
        reader: "pread" or "io_uring".
        depth: number of simultaneous reads.
        direct: whether reads bypass the page cache.

    Raises:
        InputError: the experts have another width (code "wrong_width").
    """

    limits: ClassVar[Mapping[str, Limit]] = {"slots": SLOTS, "depth": DEPTH}

    def __init__(
        self, source: ExpertSource, slots: int = 16, reader: str = "pread", depth: int = 4, direct: bool = False
    ) -> None:
        if source.layout.bits != 2:
            single = source.layout.single_format
            found = "several formats" if single is None else single.name
            raise InputError(
                f"backend=pack2 reads experts of 2 bits, these have {found}; "
                "leave backend.variant=q2, or choose another backend",
                code="wrong_width",
            )
        super().__init__(source, slots, lambda _: make_reader(reader, source, depth, direct), depth, direct)
