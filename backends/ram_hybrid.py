"""A budget of memory for the most used experts, and reads for the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import mlx.core as mx

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.stores.contract import ExpertBatch, ExpertReadError, ExpertStore, StoreStats
from flashmoe_mlx.stores.limits import BUDGET_GIB, DEPTH, MEMORY_SHARE, SLOTS, Limit
from flashmoe_mlx.stores.memory import GIB, available_memory, refuse_if_too_large, slot_memory
from flashmoe_mlx.stores.policies import make_policy
from flashmoe_mlx.stores.read_ahead import ReadAhead
from flashmoe_mlx.stores.readers import make_reader
from flashmoe_mlx.stores.slot_cache import SlotCache
from flashmoe_mlx.stores.slots import SlotMaker, Slots


class RamHybridStore(ExpertStore):
    """Keeps experts in slots, the same number for each layer, and reads missing experts.

    Options: the budget is ``budget_gib`` GiB, or else ``memory_share`` of the memory that is free when it is opened;
    ``policy`` says which expert makes room for another: lru, lfu, s3fifo, or pinned, which keeps those that were
    chosen most in the recorded ``trace`` and the others by lru; ``slots`` that one fetch may need, if the budget gives
    a layer so many; ``reader``, pread or io_uring, with ``depth`` reads under way at once, ``direct`` past the page
    cache, which then does not keep a second copy. On CUDA the slots are in the GPU's memory. Outside the budget are
    the experts of one request where they are copied for the kernels, and as many where hints are read ahead.

    ``preload`` fills all slots when it is opened, in the time that the disk takes for the budget: with the hot experts
    of ``trace``, and otherwise with those of the lowest numbers. It pays where the budget holds a good part of all.

    Each layer has separate slots: with one pool for all, layers of a token would push each other out.

    Raises:
        InputError: the budget does not fit into memory, or holds less than one expert a layer.
    """

    limits: ClassVar[Mapping[str, Limit]] = {
        "budget_gib": BUDGET_GIB,
        "memory_share": MEMORY_SHARE,
        "slots": SLOTS,
        "depth": DEPTH,
    }

    def __init__(
        self,
        source: ExpertSource,
        budget_gib: float | None = None,
        memory_share: float = 0.5,
        policy: str = "lru",
        trace: str | None = None,
        slots: int = 16,
        reader: str = "pread",
        depth: int = 4,
        direct: bool = False,
        preload: bool = False,
    ) -> None:
        SLOTS.check("slots", slots)
        record = source.layout.record_bytes
        budget = _budget(budget_gib, memory_share)
        capacity = min(budget // (record * source.num_layers), source.num_experts)
        if capacity < 1:
            raise InputError(
                f"backend=ram_hybrid: {budget / GIB:.3g} GiB are less than one expert for each of {source.num_layers} "
                f"layers; budget_gib must be at least {record * source.num_layers / GIB:.3g}",
                code="budget_too_small",
            )
        super().__init__(source, min(slots, capacity))
        self._policy = policy
        self._hot = _hot_experts(source, policy, trace)
        self._capacity = capacity
        self._caches = [self._empty(layer) for layer in range(source.num_layers)]
        maker = SlotMaker(record, self.slots)
        size = record * (source.num_layers * capacity + self.slots) + maker.beside  # and the slots of reads ahead
        refuse_if_too_large("backend=ram_hybrid", size, "choose a smaller backend.budget_gib")
        self._reader = ReadAhead(source, make_reader(reader, source, depth, direct), self.slots, depth, direct)
        self._layers: list[Slots] = []
        try:
            self._layers += (maker.make(capacity) for _ in range(source.num_layers))
            if preload:
                self._preload()
        except BaseException:
            self._release()
            raise

    def _preload(self) -> None:
        for layer, hot in enumerate(self._hot):
            wanted = list(dict.fromkeys([*hot, *range(self.source.num_experts)]))[: self._capacity]
            # The hottest come last, since policies let go of the oldest first.
            for start in range(0, self._capacity, self.slots):
                group = wanted[::-1][start : start + self.slots]
                placement = self._caches[layer].place(group)
                self._fill(layer, {expert: placement.slots[expert] for expert in group})

    def _empty(self, layer: int) -> SlotCache:
        return SlotCache(self._capacity, make_policy(self._policy, self._capacity, self._hot[layer]))

    def _bring(self, layer: int, experts: Sequence[int]) -> tuple[ExpertBatch, StoreStats]:
        distinct = list(dict.fromkeys(experts))
        try:
            placement = self._caches[layer].place(distinct)
            done = self._fill(layer, {expert: placement.slots[expert] for expert in placement.misses})
        except BaseException as error:
            # A failed read is known to have spoilt the slots of the misses; after anything else, an interrupt
            # perhaps, nothing is known of this layer.
            if not isinstance(error, ExpertReadError):
                self._caches[layer] = self._empty(layer)
            raise
        batch = self._layers[layer].batch([placement.slots[expert] for expert in experts])
        misses = len(placement.misses)
        return batch, replace(done, hits=len(distinct) - misses, misses=misses, evictions=placement.evictions)

    def _hint(self, layer: int, experts: Sequence[int]) -> None:
        # Beside the slots: what is only guessed pushes nobody out, and hits do not depend on hints.
        self._reader.advise(layer, [expert for expert in experts if expert not in self._caches[layer]])

    def _fill(self, layer: int, places: Mapping[int, int]) -> StoreStats:
        """Read each expert of ``places`` into its slot."""
        filling = self._layers[layer].fill(list(places.values()))
        try:
            done = self._reader.read(layer, places, filling)
        except ExpertReadError:
            self._caches[layer].drop(places)
            raise
        filling.commit()
        return done

    def _release(self) -> None:
        self._stats += self._reader.close()
        self._layers.clear()
        mx.clear_cache()  # MLX would keep this much memory for arrays to come


def _budget(budget_gib: float | None, memory_share: float) -> int:
    MEMORY_SHARE.check("memory_share", memory_share)
    if budget_gib is not None:
        BUDGET_GIB.check("budget_gib", budget_gib)
        most, where = slot_memory()
        if budget_gib * GIB > most:
            raise InputError(
                f"backend.budget_gib={budget_gib:g}: too large for this machine, {where} {most / GIB:.3g} GiB",
                code="budget_too_large",
            )
        return int(budget_gib * GIB)
    return int(memory_share * available_memory())


def _hot_experts(source: ExpertSource, policy: str, trace: str | None) -> list[Sequence[int]]:
    """Return the experts of each layer by descending use in the trace; empty for policies without a trace."""
    if (policy == "pinned") != (trace is not None):
        raise InputError(
            "backend.policy=pinned needs backend.trace=<recorded trace>"
            if trace is None
            else f"backend.trace={trace}: only backend.policy=pinned uses a trace",
            code="policy_without_trace" if trace is None else "trace_without_policy",
        )
    if trace is None:
        return [()] * source.num_layers
    recorded = RoutingTrace.load(expand_path(trace))
    _, layers, _ = recorded.experts.shape
    if (layers, recorded.num_experts) != (source.num_layers, source.num_experts):
        raise InputError(
            f"{trace}: recorded with {layers} layers of {recorded.num_experts} experts; this model has "
            f"{source.num_layers} of {source.num_experts}",
            code="trace_of_another_model",
        )
    return [recorded.hot_experts(layer) for layer in range(layers)]
