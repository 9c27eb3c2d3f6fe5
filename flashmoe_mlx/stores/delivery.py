"""Experts in memory, and their delivery to the caller of a fetch as they arrive."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

__all__ = ["Arrived", "Delivery", "ExpertBatch", "LayerInMemory"]


class ExpertBatch(Protocol):
    """Experts in memory, valid until the next ``fetch`` of the store that returned them.

    ``slab``, ``records``, and ``host`` are three views of the same bytes for different kernels. A store that must copy
    to provide a view copies at the first access. ``slots``, ``records``, and ``host`` follow the order of the request.
    """

    @property
    def slots(self) -> tuple[int, ...]:
        """The row of ``slab`` that holds each expert."""
        ...

    @property
    def slab(self) -> mx.array:
        """One buffer with all experts, uint8 [rows, slot bytes]; a slot begins with a record, which may be shorter."""
        ...

    @property
    def records(self) -> Sequence[mx.array]:
        """A separate array for each expert, its slot, uint8 [slot bytes]."""
        ...

    @property
    def host(self) -> Sequence[memoryview]:
        """The read-only bytes of each expert's slot for the CPU, of format "B"."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LayerInMemory:
    """All experts of one layer, in memory that MLX reads in place.

    Attributes:
        slab: one buffer with all experts, uint8 [rows, slot bytes]; a slot begins with a record.
        table: the row of ``slab`` that holds each expert, int32 [experts].
    """

    slab: mx.array
    table: mx.array


Arrived = Callable[[Sequence[int], ExpertBatch], None]
"""Receives experts, and a batch of exactly these experts in the same order, during a fetch."""


class Delivery:
    """Passes the experts of one fetch to the caller as they arrive.

    Args:
        arrived: the caller's function; None if the caller waits for all experts.
        total: number of distinct experts of the fetch.

    Attributes:
        wanted: whether the caller takes experts before all have arrived.
        seconds: time spent in ``arrived``.
        overlapped: the part of ``seconds`` during which further experts were being read.
        missing: the distinct experts that had to be read; empty if all or none had to be.
    """

    __slots__ = ("_arrived", "_delivered", "_total", "missing", "overlapped", "seconds", "wanted")

    def __init__(self, arrived: Arrived | None, total: int) -> None:
        self._arrived = arrived
        self._total = total
        self._delivered = 0
        self.wanted: bool = arrived is not None
        self.seconds: float = 0.0
        self.overlapped: float = 0.0
        self.missing: tuple[int, ...] = ()

    def deliver(self, experts: Sequence[int], batch: Callable[[], ExpertBatch]) -> None:
        """Pass ``experts`` on, with the result of ``batch``, a batch of exactly these experts."""
        if self._arrived is None:
            return
        start = time.perf_counter()
        self._delivered += len(set(experts))
        self._arrived(experts, batch())
        spent = time.perf_counter() - start
        self.seconds += spent
        if self._delivered < self._total:
            self.overlapped += spent

    def finish(self, experts: Sequence[int], batch: ExpertBatch) -> None:
        """Pass all ``experts`` on if the store has delivered none.

        Raises:
            RuntimeError: the store has delivered some of the experts, or one twice.
        """
        if not self._delivered:
            self.deliver(experts, lambda: batch)
        elif self._delivered != self._total:
            raise RuntimeError(f"the store has delivered {self._delivered} of {self._total} experts")
