"""Slots in the memory of an NVIDIA GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import mlx.core as mx

from flashmoe_mlx.custom_kernels.fill_slots import fill_slots
from flashmoe_mlx.stores.filling import Filling
from flashmoe_mlx.stores.slab import Slab


class GpuSlots:
    """``count`` slots of ``record_bytes`` in the memory of an NVIDIA GPU, filled through ``arrivals``.

    MLX would move the slots to the CPU's memory for any access to their bytes, so ``host`` of a batch is a copy.
    """

    def __init__(self, count: int, record_bytes: int, staging: "StagingArea") -> None:
        self.count = count
        self._staging = staging
        self._array = mx.zeros((count, record_bytes), mx.uint8)
        mx.eval(self._array)

    def fill(self, slots: Sequence[int]) -> Filling:
        """Begin a filling of distinct ``slots``; ``commit`` copies its rows to the GPU."""
        return self._staging.fill(self._array, slots)

    def batch(self, slots: Sequence[int]) -> "GpuBatch":
        """Return the records in ``slots``."""
        return GpuBatch(self._array, tuple(slots))


class StagingArea:
    """Memory that the CPU can write, for at most ``at_once`` records on their way to a GPU.

    All slots of a store share it, so only the latest filling is valid.
    """

    def __init__(self, at_once: int, record_bytes: int) -> None:
        self._slab = Slab(at_once, record_bytes)
        self._fillings = 0

    def fill(self, array: mx.array, slots: Sequence[int]) -> Filling:
        """Begin a filling of distinct ``slots`` of ``array``, uint8 [count, record_bytes]; ends the previous filling.

        Raises:
            ValueError: a slot occurs twice, or there are more slots than arrive at once.
        """
        if len(slots) > self._slab.count:
            raise ValueError(f"{len(slots)} slots to fill at once, there is room for {self._slab.count} arrivals")
        filling = Filling(slots, self._slab.rows(range(len(slots))), partial(self._copy, array, self._fillings + 1))
        self._fillings += 1
        return filling

    def _copy(self, array: mx.array, number: int, slots: Sequence[int]) -> None:
        if number != self._fillings:
            raise RuntimeError("the memory of these slots was handed out again before they were committed")
        fill_slots(array, self._slab.array, mx.array(list(slots), mx.int32))


@dataclass(frozen=True)
class GpuBatch:
    """An ``ExpertBatch`` of slots in a GPU's memory."""

    slab: mx.array
    slots: tuple[int, ...]

    @cached_property
    def records(self) -> list[mx.array]:
        """Views of the slab."""
        return [self.slab[slot : slot + 1].reshape(-1) for slot in self.slots]

    @property
    def host(self) -> list[memoryview]:
        """Copies for the CPU."""
        return [memoryview(record * 1).cast("B").toreadonly() for record in self.records]  # type: ignore[arg-type]
