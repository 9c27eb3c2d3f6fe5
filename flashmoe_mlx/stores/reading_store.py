"""A base class for stores that read every requested expert and keep none."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.contract import ExpertStore, StoreStats
from flashmoe_mlx.stores.delivery import Delivery, ExpertBatch
from flashmoe_mlx.stores.memory import check_memory, slots_on_gpu
from flashmoe_mlx.stores.read_ahead import ReadAhead
from flashmoe_mlx.stores.readers import ExpertReader
from flashmoe_mlx.stores.slab import Slab
from flashmoe_mlx.stores.slots import SlotMaker, Slots
from flashmoe_mlx.stores.staging import StagingArea

__all__ = ["ReadingStore"]


class ReadingStore(ExpertStore):
    """Base class of stores that read every expert of a request into slots of a slab.

    Only the page cache of the system keeps experts between requests, unless reads bypass it. On an NVIDIA GPU the slots
    are in its memory.

    Args:
        source: the location of the experts.
        slots: maximum number of distinct experts in one fetch.
        make_reader: creates the reader, given the slab that it may register.
        threads: number of threads that read hinted experts.
        direct: whether reads of hinted experts bypass the page cache.
        keep_slab: whether one slab with room for hinted experts serves all requests; otherwise the first hint replaces
            the slab by a larger one. Not used on a GPU.

    Raises:
        InputError: there is not enough memory for the slots (code "not_enough_memory").
    """

    def __init__(
        self,
        source: ExpertSource,
        slots: int,
        make_reader: Callable[[Slab | StagingArea], ExpertReader],
        threads: int,
        direct: bool = False,
        keep_slab: bool = False,
    ) -> None:
        super().__init__(source, slots)
        record = source.layout.record_bytes
        self._on_gpu: Slots | None = None
        if slots_on_gpu():
            check_memory(f"{slots} slots", slots * record, "choose fewer slots")
            maker = SlotMaker(record, slots)
            self._on_gpu = maker.make(slots)
            reader = make_reader(maker.staging())
            self._reader = ReadAhead(source, reader, slots, threads, direct, spare_rows=maker.spare_rows)
        else:
            slab = Slab(2 * slots if keep_slab else slots, record)
            self._reader = ReadAhead(source, make_reader(slab), slots, threads, direct, slab)

    def _load(self, layer: int, experts: Sequence[int], delivery: Delivery) -> tuple[ExpertBatch, StoreStats]:
        distinct = list(dict.fromkeys(experts))
        on_gpu = self._on_gpu
        if on_gpu is not None:
            places = {expert: slot for slot, expert in enumerate(distinct)}
            filling = on_gpu.fill(list(places.values()))

            def ready(arrived: Sequence[int]) -> None:
                delivery.deliver(arrived, lambda: on_gpu.batch([places[expert] for expert in arrived]))

            done = self._reader.read(layer, places, filling, ready)
            filling.commit()
            return on_gpu.batch([places[expert] for expert in experts]), replace(done, misses=len(places))
        slab, slots, done = self._reader.fetch(layer, distinct, delivery)
        return slab.batch([slots[expert] for expert in experts]), replace(done, misses=len(slots))

    def _prefetch(self, layer: int, experts: Sequence[int]) -> None:
        self._reader.prefetch(layer, experts)

    def _release(self) -> None:
        self._stats += self._reader.close()
        self._on_gpu = None
