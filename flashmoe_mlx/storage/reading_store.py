"""What stores have in common that read all that is asked for and keep nothing."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from flashmoe_mlx.expert_store import ExpertBatch, ExpertSource, ExpertStore, StoreStats
from flashmoe_mlx.storage.read_ahead import ReadAhead
from flashmoe_mlx.storage.readers import ExpertReader
from flashmoe_mlx.storage.slab import Slab


class ReadingStore(ExpertStore):
    """Reads every expert that is asked for into slots of a slab, with the reader that ``make_reader`` makes.

    What is read again soon comes from the page cache, if the reader uses it. Hints are read ahead by ``threads``
    threads, ``direct`` past the page cache.
    """

    def __init__(
        self,
        source: ExpertSource,
        slots: int,
        make_reader: Callable[[Slab], ExpertReader],
        threads: int,
        direct: bool = False,
    ) -> None:
        super().__init__(source, slots)
        slab = Slab(slots, source.layout.record_bytes)
        self._reader = ReadAhead(source, make_reader(slab), slots, threads, direct, slab)

    def _bring(self, layer: int, experts: Sequence[int]) -> tuple[ExpertBatch, StoreStats]:
        slab, slots, done = self._reader.fetch(layer, list(dict.fromkeys(experts)))
        return slab.batch([slots[expert] for expert in experts]), replace(done, misses=len(slots))

    def _hint(self, layer: int, experts: Sequence[int]) -> None:
        self._reader.advise(layer, experts)

    def _release(self) -> None:
        self._stats += self._reader.close()
