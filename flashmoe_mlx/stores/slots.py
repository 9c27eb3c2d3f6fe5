"""Slots for records that stay in memory, in the kind of memory that the kernels read fastest."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Protocol

import mlx.core as mx

from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.formats.record import RECORD_ALIGNMENT
from flashmoe_mlx.stores import memory
from flashmoe_mlx.stores.delivery import ExpertBatch, LayerInMemory
from flashmoe_mlx.stores.filling import Filling
from flashmoe_mlx.stores.gpu_slots import GpuSlots
from flashmoe_mlx.stores.host_slots import CopyBuffer, HostSlots
from flashmoe_mlx.stores.pinned import PinnedRows
from flashmoe_mlx.stores.slab import Slab
from flashmoe_mlx.stores.staging import StagingArea

__all__ = ["MemoryKind", "SlotMaker", "Slots", "choose_memory_kind", "place_table", "slots_for", "whole_layer"]


class Slots(Protocol):
    """Memory for ``count`` records that kernels can read.

    ``array`` holds all slots, uint8 [count, record bytes], or is None where MLX would have to copy them.
    """

    count: int

    @property
    def array(self) -> mx.array | None:
        """All slots."""
        ...

    def fill(self, slots: Sequence[int]) -> Filling:
        """Begin to refill ``slots``, all different."""
        ...

    def batch(self, slots: Sequence[int]) -> ExpertBatch:
        """Return the records in ``slots``."""
        ...


class MemoryKind(Enum):
    """A kind of memory for slots."""

    GPU = "the memory of an NVIDIA GPU"
    SHARED = "memory of MLX, which the CPU and MLX both use in place"
    HOST = "large pages, which CPU kernels use in place and MLX copies"


_host_kernels: ContextVar[bool | None] = ContextVar("host_kernels", default=None)


@contextmanager
def slots_for(host_kernels: bool | None) -> Iterator[None]:
    """Make stores that are opened in this context choose memory for the kernels in use.

    Args:
        host_kernels: whether the kernels of routed experts read ``ExpertBatch.host``; None: as with ``kernels=auto``.
    """
    token = _host_kernels.set(host_kernels)
    try:
        yield
    finally:
        _host_kernels.reset(token)


def choose_memory_kind() -> MemoryKind:
    """Return the kind of memory for the slots of a store that is opened now."""
    if memory.slots_on_gpu():
        return MemoryKind.GPU
    if mx.metal.is_available():  # both Metal and the CPU access the memory of MLX in place
        return MemoryKind.SHARED
    host_kernels = _host_kernels.get()
    if host_kernels is None:
        host_kernels = native.extension() is not None
    return MemoryKind.HOST if host_kernels else MemoryKind.SHARED


class SlotMaker:
    """A factory for the slots of one store.

    Args:
        record_bytes: size of the largest slot.
        at_once: maximum number of slots that one filling refills.

    Attributes:
        kind: the kind of memory of the slots.
        shared_bytes: size of further memory of the same kind, for copies of up to ``at_once`` experts.
        spare_bytes: size of further memory of the same kind, for ``at_once`` prefetched experts.
    """

    def __init__(self, record_bytes: int, at_once: int) -> None:
        self.kind: MemoryKind = choose_memory_kind()
        size = at_once * record_bytes + RECORD_ALIGNMENT
        self.shared_bytes: int = size if self.kind is MemoryKind.HOST else 0
        self.spare_bytes: int = 0 if self.kind is MemoryKind.GPU else size  # for a GPU they are in memory of the CPU
        self._record_bytes = record_bytes
        self._at_once = at_once
        self._copies = CopyBuffer(record_bytes)
        self._staging: StagingArea | None = None

    def make(self, count: int, record_bytes: int | None = None) -> Slots:
        """Make ``count`` slots of ``record_bytes`` bytes, or of the largest size.

        Raises:
            InputError: there is not enough memory (code "not_enough_memory").
        """
        size = record_bytes or self._record_bytes
        if self.kind is MemoryKind.GPU:
            return GpuSlots(count, size, self.staging())
        if self.kind is MemoryKind.SHARED:
            return Slab(count, size)
        return HostSlots(count, size, self._copies)

    def staging(self) -> StagingArea:
        """Return the memory through which records reach slots on a GPU."""
        if self._staging is None:
            self._staging = StagingArea(self._at_once, self._record_bytes)
        return self._staging

    def spare_rows(self, count: int) -> HostSlots | PinnedRows:
        """Make memory for ``count`` prefetched records, from which ``Filling.move`` brings them to slots."""
        if self.kind is MemoryKind.GPU:
            return self.staging().spare_rows(count)
        return HostSlots(count, self._record_bytes, CopyBuffer(self._record_bytes))


def place_table(slots: Sequence[int]) -> mx.array:
    """Return the slot of each expert, int32 [experts], in the memory that kernels read fastest."""
    table = mx.array(list(slots), mx.int32) + 0  # a result is in the memory of the GPU
    mx.eval(table)
    return table


def whole_layer(slots: Slots, table: mx.array) -> LayerInMemory | None:
    """Return all records in ``slots``, placed by ``table``, or None where MLX would have to copy them."""
    return None if slots.array is None else LayerInMemory(slots.array, table)
