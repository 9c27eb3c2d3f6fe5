"""Slots in the memory of an NVIDIA GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import mlx.core as mx

from flashmoe_mlx.custom_kernels.fill_slots import fill_slots
from flashmoe_mlx.stores.filling import Filling
from flashmoe_mlx.stores.slab import Slab


class GpuSlots:
    """Slots in the memory of an NVIDIA GPU.

    An access to the bytes of the slots would make MLX move all of them to the memory of the CPU, so ``host`` of a batch
    is a copy.

    Args:
        count: number of slots.
        record_bytes: size of a slot.
        staging: memory through which records reach the GPU.

    Attributes:
        array: the slots as uint8 [count, record_bytes].
    """

    def __init__(self, count: int, record_bytes: int, staging: "StagingArea") -> None:
        self.count = count
        self._staging = staging
        self.array = mx.zeros((count, record_bytes), mx.uint8)
        mx.eval(self.array)

    def fill(self, slots: Sequence[int]) -> Filling:
        """Begin to refill ``slots``, all different; ``commit`` copies the new records to the GPU."""
        return self._staging.fill(self.array, slots)

    def batch(self, slots: Sequence[int]) -> "GpuBatch":
        """Return the records in ``slots``."""
        return GpuBatch(self.array, tuple(slots))


class StagingArea:
    """Memory for at most ``at_once`` records that the CPU writes and that are then copied to a GPU.

    All slots of a store share it, so only the latest filling is valid.
    """

    def __init__(self, at_once: int, record_bytes: int) -> None:
        self._slab = Slab(at_once, record_bytes)
        self._fillings = 0

    def fill(self, array: mx.array, slots: Sequence[int]) -> Filling:
        """Begin to refill ``slots``, all different, of ``array``, uint8 [count, record_bytes].

        The previous filling becomes invalid.

        Raises:
            ValueError: a slot occurs twice, or there are more slots than rows of this memory.
        """
        if len(slots) > self._slab.count:
            raise ValueError(f"{len(slots)} slots to fill at once, but there is memory for {self._slab.count} records")
        filling = Filling(slots, self._slab.rows(range(len(slots))), partial(self._copy, array, self._fillings + 1))
        self._fillings += 1
        return filling

    def _copy(self, array: mx.array, number: int, slots: Sequence[int]) -> None:
        if number != self._fillings:
            raise RuntimeError("a later filling has taken over the memory of this one")
        fill_slots(array, self._slab.array, mx.array(list(slots), mx.int32))


@dataclass(frozen=True)
class GpuBatch:
    """An ``ExpertBatch`` of slots in the memory of a GPU."""

    slab: mx.array
    slots: tuple[int, ...]

    @cached_property
    def records(self) -> list[mx.array]:
        """A view of the slab for each expert."""
        return [self.slab[slot : slot + 1].reshape(-1) for slot in self.slots]

    @property
    def host(self) -> list[memoryview]:
        """A copy of each expert for the CPU."""
        return [memoryview(record * 1).cast("B").toreadonly() for record in self.records]  # type: ignore[arg-type]
