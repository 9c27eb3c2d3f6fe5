"""What stores have in common that read all that is asked for and keep nothing."""

from collections.abc import Callable, Sequence

from flashmoe_mlx.expert_store import ExpertBatch, ExpertSource, ExpertStore, StoreStats
from flashmoe_mlx.storage.readers import ExpertReader
from flashmoe_mlx.storage.slab import Slab


class ReadingStore(ExpertStore):
    """Reads every expert that is asked for into the first slots of a slab, with the reader that ``make_reader`` makes.

    What is read again soon comes from the page cache, if the reader uses it.
    """

    def __init__(self, source: ExpertSource, slots: int, make_reader: Callable[[Slab], ExpertReader]) -> None:
        super().__init__(source, slots)
        self._slab = Slab(slots, source.layout.record_bytes)
        self._reader = make_reader(self._slab)

    def _bring(self, layer: int, experts: Sequence[int]) -> tuple[ExpertBatch, StoreStats]:
        slots = {expert: slot for slot, expert in enumerate(dict.fromkeys(experts))}
        rows = self._slab.rows(range(len(slots)))
        reads, nbytes = self._reader.read(layer, list(zip(slots, rows, strict=True)))
        batch = self._slab.batch([slots[expert] for expert in experts])
        return batch, StoreStats(misses=len(slots), reads=reads, bytes_read=nbytes)

    def _hint(self, layer: int, experts: Sequence[int]) -> None:
        self._reader.advise(layer, experts)

    def _release(self) -> None:
        self._reader.close()
