"""All experts in memory: the upper bound that other stores are compared with."""

from collections.abc import Sequence

import mlx.core as mx

from flashmoe_mlx.expert_store import ExpertBatch, ExpertSource, ExpertStore, StoreStats
from flashmoe_mlx.storage.memory import refuse_if_too_large
from flashmoe_mlx.storage.readers import make_reader
from flashmoe_mlx.storage.slab import Slots, make_slots

_AT_ONCE = 16
"""Experts read together while opening."""


class ResidentStore(ExpertStore):
    """Reads every expert when it is opened; a fetch then only says where they are.

    Options: ``reader``, pread or io_uring, and ``depth`` reads under way at once, for opening.

    Raises:
        InputError: they do not fit into the memory that is free; says how much is needed.
    """

    def __init__(self, source: ExpertSource, reader: str = "pread", depth: int = 4) -> None:
        super().__init__(source, source.num_experts)
        record = source.layout.record_bytes
        refuse_if_too_large(
            "backend=resident",
            source.num_layers * source.num_experts * record,
            "use backend=ram_hybrid, which keeps as many as fit, or a variant of fewer bits",
        )
        self._layers: list[Slots] = []
        opened = make_reader(reader, source, depth)
        try:
            for layer in range(source.num_layers):
                slots = make_slots(source.num_experts, record, _AT_ONCE)
                for start in range(0, source.num_experts, _AT_ONCE):
                    group = range(start, min(start + _AT_ONCE, source.num_experts))
                    reads, nbytes = opened.read(layer, list(zip(group, slots.rows(group), strict=True)))
                    slots.commit(group)
                    self._stats += StoreStats(reads=reads, bytes_read=nbytes)
                self._layers.append(slots)
        finally:
            opened.close()

    def _bring(self, layer: int, experts: Sequence[int]) -> tuple[ExpertBatch, StoreStats]:
        return self._layers[layer].batch(experts), StoreStats(hits=len(set(experts)))

    def _release(self) -> None:
        self._layers.clear()
        mx.clear_cache()  # MLX would keep this much memory for arrays to come
