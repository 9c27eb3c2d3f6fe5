"""Memory through which records reach an NVIDIA GPU."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.fill_slots import begin_filling_slots, finish_filling_slots
from flashmoe_mlx.formats.record import RECORD_ALIGNMENT
from flashmoe_mlx.stores.filling import Filling, Rows
from flashmoe_mlx.stores.libc import address_of
from flashmoe_mlx.stores.pinned import PinnedRows

_MOST_JOBS = RECORD_ALIGNMENT // 16
"""Copies that the table holds between two waits, two words each."""


class StagingArea:
    """Memory for at most ``at_once`` records that the CPU writes and that a kernel then copies to a GPU.

    All slots of a store share it, so only the latest filling is valid. Copies run while further records are read, and
    after ``commit``: kernels that are launched later read the new records, and the next filling waits for the copies
    before it gives out the memory again.
    """

    def __init__(self, at_once: int, record_bytes: int) -> None:
        self.count = at_once
        """Number of rows."""
        self._record_bytes = record_bytes
        self._memory = PinnedRows(at_once, record_bytes)
        (table,) = PinnedRows(1, RECORD_ALIGNMENT).rows([0])
        self._table = np.frombuffer(table, np.int64).reshape(-1, 2)
        self._jobs = mx.array([address_of(table), 0, 0, 0], mx.int64) + 0  # a result is in the memory of the GPU
        mx.eval(self._jobs)
        self._entries = 0
        """Entries of the table in use."""
        self._begun: list[mx.array] = []
        self._launches = 0
        """The number of launches since the last wait; larger than that of ``_begun`` if an interrupt came between."""
        self._fillings = 0

    def rows(self, places: Sequence[int]) -> list[memoryview]:
        """Return the writable bytes of the rows with the indices ``places``."""
        return self._memory.rows(places)

    def spare_rows(self, count: int) -> PinnedRows:
        """Return other memory, from which ``Filling.move`` copies: for ``count`` records while as many are copied."""
        return PinnedRows(2 * count, self._record_bytes)

    def fill(self, array: mx.array, slots: Sequence[int]) -> Filling:
        """Begin to refill ``slots``, all different, of ``array``, uint8 [count, record_bytes].

        The previous filling becomes invalid.

        Raises:
            ValueError: a slot occurs twice, or there are more slots than rows of this memory.
        """
        if len(slots) > self.count:
            raise ValueError(f"{len(slots)} slots to fill at once, but there is memory for {self.count} records")
        self.wait()
        filling = _StagedFilling(self, array, slots, self._fillings + 1)
        self._fillings += 1
        return filling

    def copy(self, array: mx.array, sources: Sequence[memoryview], slots: Sequence[int]) -> None:
        """Begin to copy records to ``slots`` of ``array``."""
        if self._entries + len(slots) > _MOST_JOBS:
            self.wait()
        first, self._entries = self._entries, self._entries + len(slots)
        for entry, (source, slot) in enumerate(zip(sources, slots, strict=True), first):
            self._table[entry] = address_of(source), slot
        self._launches += 1
        self._begun.append(begin_filling_slots(array, self._jobs, first, len(slots)))

    def wait(self) -> None:
        """Wait for all copies."""
        if self._launches:
            finish_filling_slots(self._begun if len(self._begun) == self._launches else None)
        self._launches = 0
        self._begun = []
        self._entries = 0

    def check_latest(self, number: int) -> None:
        """Raise RuntimeError unless ``number`` is that of the latest filling, counted from 1."""
        if number != self._fillings:
            raise RuntimeError("a later filling has taken over the memory of this one")


class _StagedFilling(Filling):
    """A filling of slots on a GPU."""

    copies_later = True

    def __init__(self, staging: StagingArea, array: mx.array, slots: Sequence[int], number: int) -> None:
        super().__init__(slots, staging.rows(range(len(slots))), self._finish)
        self._staging = staging
        self._array = array
        self._number = number
        self._copied: set[int] = set()

    def arrived(self, slots: Sequence[int]) -> None:
        self._staging.check_latest(self._number)
        self._copied.update(slots)
        self._staging.copy(self._array, [self._rows[slot] for slot in slots], slots)

    def move(self, slot: int, source: Rows, place: int) -> None:
        self._staging.check_latest(self._number)
        self._copied.add(slot)
        self._staging.copy(self._array, source.rows([place]), [slot])

    def give_up(self) -> None:
        self._staging.wait()

    def _finish(self, slots: Sequence[int]) -> None:
        self._staging.check_latest(self._number)
        rest = [slot for slot in slots if slot not in self._copied]
        if rest:
            self.arrived(rest)
