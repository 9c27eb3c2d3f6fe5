"""All experts in memory: the upper bound for every other store."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import mlx.core as mx

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.shares import served
from flashmoe_mlx.progress import report
from flashmoe_mlx.stores.contract import ExpertStore, StoreStats
from flashmoe_mlx.stores.delivery import Delivery, ExpertBatch, LayerInMemory
from flashmoe_mlx.stores.filling import Filling
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
        experts = [served(source, layer) for layer in range(source.num_layers)]
        size = sum(len(own) * layout.record_bytes for own, layout in zip(experts, source.layout, strict=True))
        check_memory(
            "backend=resident",
            size + maker.shared_bytes,
            "use backend=ram_hybrid, which keeps as many experts as fit, or a variant of fewer bits",
        )
        self._layers: list[Slots] = []
        self._places = [{expert: slot for slot, expert in enumerate(own)} for own in experts]
        expert_reader = make_reader(reader, source, depth)
        try:
            for layer, (own, places) in enumerate(zip(experts, self._places, strict=True)):
                slots = maker.make(max(1, len(own)), source.layout[layer].record_bytes)
                for start in range(0, len(own), _BATCH):
                    filling = slots.fill(range(start, min(start + _BATCH, len(own))))
                    wanted = [(own[slot], row) for slot, row in filling.rows.items()]

                    def arrived(
                        read: Sequence[int], filling: Filling = filling, places: Mapping[int, int] = places
                    ) -> None:
                        filling.arrived([places[expert] for expert in read])

                    try:
                        reads, nbytes = expert_reader.read(layer, wanted, arrived)
                    except BaseException:
                        filling.give_up()
                        raise
                    filling.commit()
                    self._stats += StoreStats(reads=reads, bytes_read=nbytes)
                    report(f"reading experts: {self._stats.bytes_read / 1e9:.1f} of {size / 1e9:.1f} GB")
                self._layers.append(slots)
        finally:
            expert_reader.close()
        self._whole = [
            whole_layer(slots, place_table([places.get(expert, -1) for expert in range(source.num_experts)]))
            for slots, places in zip(self._layers, self._places, strict=True)
        ]

    def _load(self, layer: int, experts: Sequence[int], delivery: Delivery) -> tuple[ExpertBatch, StoreStats]:  # noqa: ARG002  # there are only hits
        places = self._places[layer]
        return self._layers[layer].batch([places[expert] for expert in experts]), StoreStats(hits=len(set(experts)))

    def _in_memory(self, layer: int) -> LayerInMemory | None:
        return self._whole[layer]

    def _release(self) -> None:
        self._layers.clear()
        self._whole.clear()
        mx.clear_cache()  # MLX would keep the memory for later arrays
