"""Experts read straight from a published safetensors checkpoint, without a pack."""

from collections.abc import Mapping
from typing import ClassVar

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.manifest import PackedExperts
from flashmoe_mlx.stores.limits import DEPTH, SLOTS, Limit
from flashmoe_mlx.stores.readers import make_reader
from flashmoe_mlx.stores.reading_store import ReadingStore


class CheckpointStore(ReadingStore):
    """A store that reads each requested expert from its pieces in the shards.

    A quantized checkpoint holds an expert in nine pieces; adjacent pieces are read together.

    Args:
        source: the location of the experts in a checkpoint.
        slots: maximum number of distinct experts in one fetch.
        reader: "pread" or "io_uring".
        depth: number of simultaneous reads.

    Raises:
        InputError: ``source`` is a pack (code "not_a_checkpoint").
    """

    limits: ClassVar[Mapping[str, Limit]] = {"slots": SLOTS, "depth": DEPTH}

    def __init__(self, source: ExpertSource, slots: int = 16, reader: str = "pread", depth: int = 8) -> None:
        if isinstance(source, PackedExperts):
            raise InputError(
                f"backend=checkpoint: {source.directory.parent} is a pack; give the folder of a checkpoint as "
                "model.path, or choose another backend",
                code="not_a_checkpoint",
            )
        super().__init__(source, slots, lambda _: make_reader(reader, source, depth), depth)
