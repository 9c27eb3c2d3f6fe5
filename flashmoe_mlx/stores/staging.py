"""Memory through which records reach an NVIDIA GPU."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx

from flashmoe_mlx.custom_kernels.fill_slots import fill_slots
from flashmoe_mlx.stores.copy_engine import CopyEngine, CopyEngineError, PinnedRows, copy_engine
from flashmoe_mlx.stores.filling import Filling, Rows
from flashmoe_mlx.stores.host_slots import CopyBuffer, HostSlots
from flashmoe_mlx.stores.libc import address_of
from flashmoe_mlx.stores.slab import Slab

_log = logging.getLogger(__name__)


class StagingArea:
    """Memory for at most ``at_once`` records that the CPU writes and that are then copied to a GPU.

    All slots of a store share it, so only the latest filling is valid. The memory is pinned, and the copy engine copies
    each part of a record as soon as the part was read. Where the driver refuses that, the memory is managed, and a
    kernel copies whole records.

    Attributes:
        count: number of rows.
        pinned: whether the memory is pinned.
    """

    def __init__(self, at_once: int, record_bytes: int) -> None:
        self.count = at_once
        self._record_bytes = record_bytes
        self._engine = copy_engine()
        self._memory = self._pinned_rows(at_once) or Slab(at_once, record_bytes)
        self.pinned = isinstance(self._memory, PinnedRows)
        self._fillings = 0

    def rows(self, places: Sequence[int]) -> Sequence[memoryview]:
        """Return the writable bytes of the rows with the indices ``places``."""
        return self._memory.rows(places)

    def spare_rows(self, count: int) -> PinnedRows | HostSlots:
        """Return other memory, for ``count`` records, from which ``Filling.move`` brings records to the GPU."""
        return self._pinned_rows(count) or HostSlots(count, self._record_bytes, CopyBuffer(self._record_bytes))

    def _pinned_rows(self, count: int) -> PinnedRows | None:
        if self._engine is None:
            return None
        try:
            return PinnedRows(count, self._record_bytes, self._engine)
        except (CopyEngineError, OSError) as error:
            _log.warning("%s; experts reach the GPU through slower memory", error)
            return None

    def fill(self, array: mx.array, address: int | None, slots: Sequence[int]) -> Filling:
        """Begin to refill ``slots``, all different, of ``array``, uint8 [count, record_bytes].

        The previous filling becomes invalid.

        Args:
            array: the slots.
            address: address of ``array`` in the memory of the GPU; needed only if ``pinned``.
            slots: indices of slots.

        Raises:
            ValueError: a slot occurs twice, or there are more slots than rows of this memory.
        """
        if len(slots) > self.count:
            raise ValueError(f"{len(slots)} slots to fill at once, but there is memory for {self.count} records")
        rows, check_latest = self.rows(range(len(slots))), partial(self._check_latest, self._fillings + 1)
        if isinstance(self._memory, Slab):
            filling = Filling(slots, rows, partial(_copy_by_kernel, array, self._memory, check_latest))
        else:
            assert self._engine is not None
            assert address is not None
            self._engine.wait()  # for copies of a filling that was given up
            filling = _PinnedFilling(slots, rows, self._engine, address, check_latest)
        self._fillings += 1
        return filling

    def _check_latest(self, number: int) -> None:
        if number != self._fillings:
            raise RuntimeError("a later filling has taken over the memory of this one")


def _copy_by_kernel(array: mx.array, slab: Slab, check_latest: Callable[[], None], slots: Sequence[int]) -> None:
    check_latest()
    fill_slots(array, slab.array, mx.array(list(slots), mx.int32))


class _PinnedFilling(Filling):
    """A filling whose parts the copy engine copies while further parts are read."""

    def __init__(
        self,
        slots: Sequence[int],
        rows: Sequence[memoryview],
        engine: CopyEngine,
        address: int,
        check_latest: Callable[[], None],
    ) -> None:
        super().__init__(slots, rows, self._finish)
        self._engine = engine
        self._address = address
        self._check_latest = check_latest
        self._begun: dict[int, list[int]] = {slot: [] for slot in slots}
        """The sizes of the parts whose copies have begun, by slot."""
        self._order = list(slots)
        self._start = address_of(rows[0]) if rows else 0

    @property
    def written(self) -> Callable[[memoryview], None]:
        return self._copy

    def _copy(self, part: memoryview) -> None:
        """Begin to copy ``part``, which lies inside one row."""
        place, offset = divmod(address_of(part) - self._start, self._record_bytes)
        self._begin(self._order[place], part, offset)

    @property
    def _record_bytes(self) -> int:
        return self._rows[self._order[0]].nbytes

    def move(self, slot: int, source: Rows, place: int) -> None:
        if isinstance(source, PinnedRows):
            self._begin(slot, source.rows([place])[0], 0)
        else:
            super().move(slot, source, place)

    def give_up(self) -> None:
        self._engine.wait()

    def _begin(self, slot: int, part: memoryview, offset: int) -> None:
        self._engine.begin_copy(self._address + slot * self._record_bytes + offset, part)
        self._begun[slot].append(part.nbytes)

    def _finish(self, slots: Sequence[int]) -> None:
        self._check_latest()
        for slot in slots:
            if sum(self._begun[slot]) != self._record_bytes:
                self._begin(slot, self._rows[slot], 0)
        self._engine.wait()
