"""The base of stores that read every requested expert and keep none."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.contract import ExpertBatch, ExpertStore, StoreStats
from flashmoe_mlx.stores.read_ahead import ReadAhead
from flashmoe_mlx.stores.readers import ExpertReader
from flashmoe_mlx.stores.slab import Slab


class ReadingStore(ExpertStore):
    """Reads every expert of a request into slots of a slab.

    A record that is read again soon comes from the page cache, if the reader uses it.

    Args:
        source: where the experts are.
        slots: most experts of a request.
        make_reader: makes the reader, for a slab that may be registered with it.
        threads: threads that read hinted experts ahead.
        direct: read ahead past the page cache.
        keep_slab: use one slab from opening to closing, with room for reads ahead; without, the first hint replaces it.
    """

    def __init__(
        self,
        source: ExpertSource,
        slots: int,
        make_reader: Callable[[Slab], ExpertReader],
        threads: int,
        direct: bool = False,
        keep_slab: bool = False,
    ) -> None:
        super().__init__(source, slots)
        slab = Slab(2 * slots if keep_slab else slots, source.layout.record_bytes)
        self._reader = ReadAhead(source, make_reader(slab), slots, threads, direct, slab)

    def _load(self, layer: int, experts: Sequence[int]) -> tuple[ExpertBatch, StoreStats]:
        slab, slots, done = self._reader.fetch(layer, list(dict.fromkeys(experts)))
        return slab.batch([slots[expert] for expert in experts]), replace(done, misses=len(slots))

    def _prefetch(self, layer: int, experts: Sequence[int]) -> None:
        self._reader.advise(layer, experts)

    def _release(self) -> None:
        self._stats += self._reader.close()
