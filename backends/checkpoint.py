"""Experts straight from a published safetensors checkpoint, without a pack."""

from collections.abc import Mapping
from typing import ClassVar

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.manifest import PackedExperts
from flashmoe_mlx.stores.limits import DEPTH, SLOTS, Limit
from flashmoe_mlx.stores.readers import make_reader
from flashmoe_mlx.stores.reading_store import ReadingStore


class CheckpointStore(ReadingStore):
    """Gathers every requested expert from its places in the shards: nine in a quantised checkpoint, fewer
    where they adjoin.

    Options: ``slots`` of one fetch; ``reader``, pread or io_uring; ``depth`` reads under way at once.
    """

    limits: ClassVar[Mapping[str, Limit]] = {"slots": SLOTS, "depth": DEPTH}

    def __init__(self, source: ExpertSource, slots: int = 16, reader: str = "pread", depth: int = 8) -> None:
        if isinstance(source, PackedExperts):
            raise InputError(
                f"backend=checkpoint: {source.directory.parent} is a pack; give the folder of a checkpoint as "
                "model.path, or choose another backend"
            )
        super().__init__(source, slots, lambda _: make_reader(reader, source, depth), depth)
