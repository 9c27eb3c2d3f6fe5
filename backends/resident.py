"""All experts in memory: the upper bound for every other store."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import mlx.core as mx

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.progress import report
from flashmoe_mlx.stores.contract import ExpertStore, StoreStats
from flashmoe_mlx.stores.delivery import Delivery, ExpertBatch, LayerInMemory
from flashmoe_mlx.stores.limits import DEPTH, Limit
from flashmoe_mlx.stores.memory import check_memory
from flashmoe_mlx.stores.readers import make_reader
from flashmoe_mlx.stores.slots import SlotMaker, Slots, place_table, whole_layer

_BATCH = 16
"""Experts read together while the store is opened."""


class ResidentStore(ExpertStore):
    """A store that reads every expert when it is opened, so that a fetch only looks up slots.

    Args:
        source: the location of the experts.
        reader: "pread" or "io_uring"; used only while the store is opened.
        depth: number of simultaneous reads while the store is opened.

    Raises:
        InputError: the experts do not fit into the free memory (code "not_enough_memory").
        ExpertReadError: an expert could not be read.
    """

    limits: ClassVar[Mapping[str, Limit]] = {"depth": DEPTH}

    reads: ClassVar[bool] = False

    def __init__(self, source: ExpertSource, reader: str = "pread", depth: int = 4) -> None:
        super().__init__(source, source.num_experts)
        maker = SlotMaker(source.layout.record_bytes, _BATCH)
        size = source.num_experts * source.layout.bytes_in_all_layers
        check_memory(
            "backend=resident",
            size + maker.shared_bytes,
            "use backend=ram_hybrid, which keeps as many experts as fit, or a variant of fewer bits",
        )
        self._layers: list[Slots] = []
        expert_reader = make_reader(reader, source, depth)
        try:
            for layer in range(source.num_layers):
                slots = maker.make(source.num_experts, source.layout[layer].record_bytes)
                for start in range(0, source.num_experts, _BATCH):
                    filling = slots.fill(range(start, min(start + _BATCH, source.num_experts)))
                    wanted = list(filling.rows.items())  # expert n is in slot n
                    try:
                        reads, nbytes = expert_reader.read(layer, wanted, filling.arrived)
                    except BaseException:
                        filling.give_up()
                        raise
                    filling.commit()
                    self._stats += StoreStats(reads=reads, bytes_read=nbytes)
                    report(f"reading experts: {self._stats.bytes_read / 1e9:.1f} of {size / 1e9:.1f} GB")
                self._layers.append(slots)
        finally:
            expert_reader.close()
        table = place_table(range(source.num_experts))
        self._whole = [whole_layer(slots, table) for slots in self._layers]

    def _load(self, layer: int, experts: Sequence[int], delivery: Delivery) -> tuple[ExpertBatch, StoreStats]:  # noqa: ARG002  # there are only hits
        return self._layers[layer].batch(experts), StoreStats(hits=len(set(experts)))

    def _in_memory(self, layer: int) -> LayerInMemory | None:
        return self._whole[layer]

    def _release(self) -> None:
        self._layers.clear()
        self._whole.clear()
        mx.clear_cache()  # MLX would keep the memory for later arrays
