"""Slots for records that stay in memory, in the kind of memory that suits the kernels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Protocol

import mlx.core as mx

from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.formats.record import RECORD_ALIGNMENT
from flashmoe_mlx.stores import memory
from flashmoe_mlx.stores.contract import ExpertBatch
from flashmoe_mlx.stores.filling import Filling
from flashmoe_mlx.stores.gpu_slots import GpuSlots, StagingArea
from flashmoe_mlx.stores.host_slots import CopyBuffer, HostSlots
from flashmoe_mlx.stores.slab import Slab


class Slots(Protocol):
    """Memory for ``count`` records, at a place where kernels can read them."""

    count: int

    def fill(self, slots: Sequence[int]) -> Filling:
        """Return memory for new records of distinct ``slots``; ``commit`` makes them the content of the slots."""
        ...

    def batch(self, slots: Sequence[int]) -> ExpertBatch:
        """Return the records in ``slots``."""
        ...


class MemoryKind(Enum):
    """A kind of memory for slots."""

    GPU = "the memory of an NVIDIA GPU"
    SHARED = "memory of MLX, which the CPU and MLX both use in place"
    HOST = "memory in large pages, which kernels of the CPU use in place and MLX copies"


_host_kernels: ContextVar[bool | None] = ContextVar("host_kernels", default=None)


@contextmanager
def slots_for(host_kernels: bool | None) -> Iterator[None]:
    """Make stores that are opened inside choose slots for the kernels in use.

    Args:
        host_kernels: whether kernels that read ``ExpertBatch.host`` compute routed experts; None: as ``kernels=auto``.
    """
    token = _host_kernels.set(host_kernels)
    try:
        yield
    finally:
        _host_kernels.reset(token)


def choose_memory_kind() -> MemoryKind:
    """Return the kind of memory for a store opened now; without ``slots_for``, the kind for ``kernels=auto``."""
    if memory.slots_on_gpu():
        return MemoryKind.GPU
    if mx.metal.is_available():  # reads MLX's memory in place, and so does the CPU
        return MemoryKind.SHARED
    host_kernels = _host_kernels.get()
    if host_kernels is None:
        host_kernels = native.extension() is not None
    return MemoryKind.HOST if host_kernels else MemoryKind.SHARED


class SlotMaker:
    """A factory of the slots of one store, for records of ``record_bytes``, at most ``at_once`` filled at a time.

    What all of them use shared_bytes their own memory exists once: room for copies or for arrivals. ``shared_bytes`` is its size in
    bytes where it is sure to be needed or bounded by ``at_once``.
    """

    def __init__(self, record_bytes: int, at_once: int) -> None:
        self.kind = choose_memory_kind()
        self.shared_bytes = 0 if self.kind is MemoryKind.SHARED else at_once * record_bytes + RECORD_ALIGNMENT
        self._record_bytes = record_bytes
        self._at_once = at_once
        self._copies = CopyBuffer(record_bytes)
        self._staging: StagingArea | None = None

    def make(self, count: int) -> Slots:
        """Make ``count`` slots.

        Raises:
            InputError: there is no memory for them.
        """
        if self.kind is MemoryKind.GPU:
            if self._staging is None:
                self._staging = StagingArea(self._at_once, self._record_bytes)
            return GpuSlots(count, self._record_bytes, self._staging)
        if self.kind is MemoryKind.SHARED:
            return Slab(count, self._record_bytes)
        return HostSlots(count, self._record_bytes, self._copies)
