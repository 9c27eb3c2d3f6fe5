"""A memory budget for the most used experts; all other experts are read from storage."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import mlx.core as mx

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.shares import served
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.stores.contract import ExpertReadError, ExpertStore, StoreStats
from flashmoe_mlx.stores.delivery import Delivery, ExpertBatch, LayerInMemory
from flashmoe_mlx.stores.limits import BUDGET_GIB, DEPTH, MEMORY_SHARE, SLOTS, Limit
from flashmoe_mlx.stores.memory import GIB, available_memory, check_memory, slot_memory
from flashmoe_mlx.stores.policies import make_policy
from flashmoe_mlx.stores.read_ahead import ReadAhead
from flashmoe_mlx.stores.readers import make_reader
from flashmoe_mlx.stores.slot_cache import SlotCache
from flashmoe_mlx.stores.slots import SlotMaker, Slots, place_table, whole_layer


class RamHybridStore(ExpertStore):
    """A store that keeps experts in slots, the same number in each layer, and reads missing experts.

    Each layer has separate slots, because in a common pool the layers of one token would evict each other's experts.
    With an NVIDIA GPU the slots are in GPU memory. The budget does not include two things: a copy of the experts of
    one request where kernels need a copy, and slots for as many hinted experts.

    Args:
        source: the location of the experts.
        budget_gib: size of all slots in GiB; None for ``memory_share``.
        memory_share: size of all slots as a share of the memory that is free when the store is opened.
        policy: how a layer chooses the expert that loses its slot: "lru", "lfu", "s3fifo", or "pinned". "pinned" keeps
            the experts that ``trace`` used most, and applies LRU to all other experts.
        trace: path of a routing trace; required for "pinned" and for no other policy.
        slots: maximum number of distinct experts in one fetch, if the budget gives a layer that many.
        reader: "pread" or "io_uring".
        depth: number of simultaneous reads.
        direct: whether reads bypass the page cache, which otherwise holds a second copy of the experts.
        preload: whether all slots are filled when the store is opened: with the hottest experts of ``trace``, or
            without a trace with the experts of the lowest indices. This takes as long as the disk needs to read the
            budget, and pays off where the budget holds a large part of all experts.

    Raises:
        InputError: the budget does not fit into memory (codes "budget_too_large", "not_enough_memory") or holds less
            than one expert in each layer ("budget_too_small"), or the policy and the trace do not go together.
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
        column = source.layout.bytes_in_all_layers
        budget = _budget(budget_gib, memory_share)
        capacity = min(budget // column, max(len(served(source, layer)) for layer in range(source.num_layers)))
        if capacity < 1:
            raise InputError(
                f"backend=ram_hybrid: {budget / GIB:.3g} GiB hold less than one expert for each of {source.num_layers} "
                f"layers; backend.budget_gib must be at least {column / GIB:.3g}",
                code="budget_too_small",
            )
        super().__init__(source, min(slots, capacity))
        self._policy = policy
        self._hot = _hot_experts(source, policy, trace)
        self._capacity = capacity
        self._caches = [self._empty(layer) for layer in range(source.num_layers)]
        maker = SlotMaker(source.layout.record_bytes, self.slots)
        size = column * capacity + maker.shared_bytes + maker.spare_bytes
        check_memory("backend=ram_hybrid", size, "choose a smaller backend.budget_gib")
        self._reader = ReadAhead(
            source,
            make_reader(reader, source, depth, direct),
            self.slots,
            depth,
            direct,
            spare_rows=maker.spare_rows,
        )
        self._layers: list[Slots] = []
        self._whole: dict[int, LayerInMemory | None] = {}
        self._places: dict[int, list[int]] = {}
        """The slots of all experts, for each layer in ``_whole``."""
        try:
            self._layers += (maker.make(capacity, layout.record_bytes) for layout in source.layout)
            if preload:
                self._preload()
        except BaseException:
            self._release()
            raise

    def _preload(self) -> None:
        for layer, hot in enumerate(self._hot):
            own = served(self.source, layer)
            wanted = [expert for expert in dict.fromkeys([*hot, *own]) if expert in own][: self._capacity]
            # The hottest experts come last, because policies evict the oldest first.
            for start in range(0, len(wanted), self.slots):
                group = wanted[::-1][start : start + self.slots]
                placement = self._caches[layer].place(group)
                self._fill(layer, {expert: placement.slots[expert] for expert in group})

    def _empty(self, layer: int) -> SlotCache:
        return SlotCache(self._capacity, make_policy(self._policy, self._capacity, self._hot[layer]))

    def _load(self, layer: int, experts: Sequence[int], delivery: Delivery) -> tuple[ExpertBatch, StoreStats]:
        distinct = list(dict.fromkeys(experts))
        if layer in self._places:
            places = self._places[layer]
            return self._layers[layer].batch([places[expert] for expert in experts]), StoreStats(hits=len(distinct))
        try:
            placement = self._caches[layer].place(distinct)
            delivery.missing = placement.misses
            missing = {expert: placement.slots[expert] for expert in placement.misses}
            held: list[int] | None = [expert for expert in distinct if expert not in missing]

            def ready(arrived: Sequence[int]) -> None:
                nonlocal held
                usable, held = [*(held or ()), *arrived], None  # experts that have slots come with the first arrivals
                slots = [placement.slots[expert] for expert in usable]
                delivery.deliver(usable, lambda: self._layers[layer].batch(slots))

            done = self._fill(layer, missing, ready if missing else None)
        except BaseException as error:
            # After a failed read only the slots of the misses are invalid. After any other error, such as an
            # interrupt, the state of this layer is unknown.
            if not isinstance(error, ExpertReadError):
                self._caches[layer] = self._empty(layer)
            raise
        batch = self._layers[layer].batch([placement.slots[expert] for expert in experts])
        misses = len(placement.misses)
        return batch, replace(done, hits=len(distinct) - misses, misses=misses, evictions=placement.evictions)

    def _in_memory(self, layer: int) -> LayerInMemory | None:
        if layer not in self._whole:
            cache = self._caches[layer]
            own = served(self.source, layer)
            if len(cache) < len(own):
                return None
            # From now on every request is a hit, and no expert loses its slot.
            places = [-1] * self.source.num_experts
            for expert, slot in zip(own, cache.slots(own), strict=True):
                places[expert] = slot
            self._whole[layer] = whole_layer(self._layers[layer], place_table(places))
            self._places[layer] = places
        return self._whole[layer]

    def _prefetch(self, layer: int, experts: Sequence[int]) -> None:
        # Hinted experts get separate slots: a guess evicts no expert, and hits do not depend on hints.
        self._reader.prefetch(layer, [expert for expert in experts if expert not in self._caches[layer]])

    def _fill(
        self, layer: int, places: Mapping[int, int], ready: Callable[[Sequence[int]], None] | None = None
    ) -> StoreStats:
        """Read each expert of ``places``, a map from experts to slots, into its slot; ``ready`` is as for readers."""
        filling = self._layers[layer].fill(list(places.values()))
        try:
            done = self._reader.read(layer, places, filling, ready)
        except ExpertReadError:
            self._caches[layer].drop(places)
            raise
        filling.commit()
        return done

    def _release(self) -> None:
        self._stats += self._reader.close()
        self._layers.clear()
        self._whole.clear()
        mx.clear_cache()  # MLX would keep the memory for later arrays


def _budget(budget_gib: float | None, memory_share: float) -> int:
    MEMORY_SHARE.check("memory_share", memory_share)
    if budget_gib is not None:
        BUDGET_GIB.check("budget_gib", budget_gib)
        largest, name = slot_memory()
        if budget_gib * GIB > largest:
            raise InputError(
                f"backend.budget_gib={budget_gib:g}: too large for this machine: {name} is {largest / GIB:.3g} GiB",
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
