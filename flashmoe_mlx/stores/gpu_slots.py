"""Slots in the memory of an NVIDIA GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from flashmoe_mlx.stores.filling import Filling
from flashmoe_mlx.stores.staging import StagingArea


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

    def __init__(self, count: int, record_bytes: int, staging: StagingArea) -> None:
        self.count = count
        self.array: mx.array = mx.zeros((count, record_bytes), mx.uint8)
        mx.eval(self.array)
        self._staging = staging

    def fill(self, slots: Sequence[int]) -> Filling:
        """Begin to refill ``slots``, all different; kernels launched after ``commit`` read the new records."""
        return self._staging.fill(self.array, slots)

    def batch(self, slots: Sequence[int]) -> "GpuBatch":
        """Return the records in ``slots``."""
        return GpuBatch(self.array, tuple(slots))


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
