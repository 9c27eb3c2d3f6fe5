"""All experts in memory: the upper bound for every other store."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import mlx.core as mx

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.contract import ExpertBatch, ExpertStore, StoreStats
from flashmoe_mlx.stores.limits import DEPTH, Limit
from flashmoe_mlx.stores.memory import refuse_if_too_large
from flashmoe_mlx.stores.readers import make_reader
from flashmoe_mlx.stores.slots import SlotMaker, Slots

_AT_ONCE = 16
"""Experts read together while opening."""


class ResidentStore(ExpertStore):
    """Reads every expert when it is opened; a fetch only looks up their slots.

    Options: ``reader``, pread or io_uring, and ``depth`` reads under way at once, for opening.

    Raises:
        InputError: they do not fit into the memory that is free; says how much is needed.
    """

    limits: ClassVar[Mapping[str, Limit]] = {"depth": DEPTH}

    def __init__(self, source: ExpertSource, reader: str = "pread", depth: int = 4) -> None:
        super().__init__(source, source.num_experts)
        maker = SlotMaker(source.layout.record_bytes, _AT_ONCE)
        refuse_if_too_large(
            "backend=resident",
            source.num_layers * source.num_experts * source.layout.record_bytes + maker.beside,
            "use backend=ram_hybrid, which keeps as many as fit, or a variant of fewer bits",
        )
        self._layers: list[Slots] = []
        opened = make_reader(reader, source, depth)
        try:
            for layer in range(source.num_layers):
                slots = maker.make(source.num_experts)
                for start in range(0, source.num_experts, _AT_ONCE):
                    filling = slots.fill(range(start, min(start + _AT_ONCE, source.num_experts)))
                    reads, nbytes = opened.read(layer, list(filling.rows.items()))  # expert n is in slot n
                    filling.commit()
                    self._stats += StoreStats(reads=reads, bytes_read=nbytes)
                self._layers.append(slots)
        finally:
            opened.close()

    def _bring(self, layer: int, experts: Sequence[int]) -> tuple[ExpertBatch, StoreStats]:
        return self._layers[layer].batch(experts), StoreStats(hits=len(set(experts)))

    def _release(self) -> None:
        self._layers.clear()
        mx.clear_cache()  # MLX would keep this much memory for arrays to come
