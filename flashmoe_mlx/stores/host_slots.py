"""Slots in large pages, for CPU kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.stores.allocation import allocate_huge_pages
from flashmoe_mlx.stores.filling import Filling, Rows
from flashmoe_mlx.stores.memory import GIB, check_memory
from flashmoe_mlx.stores.slab import Slab, check_allocation


class HostSlots:
    """Slots in large pages, outside the memory of MLX, for CPU kernels.

    MLX allocates small pages, and on CPUs it cannot use foreign memory in place. The arrays of a batch are therefore
    copies, made at the first access. CPU kernels read ``host`` and need no copy.

    Args:
        count: number of slots.
        record_bytes: size of a slot.
        copies: memory for the copies.

    Attributes:
        array: None, because MLX has no array of these slots.
        record_bytes: size of a slot.

    Raises:
        InputError: there is not enough memory (code "not_enough_memory").
    """

    def __init__(self, count: int, record_bytes: int, copies: "CopyBuffer") -> None:
        size = count * record_bytes
        check_allocation(count, size)
        self.count = count
        self.record_bytes = record_bytes
        self.array: None = None
        try:
            host = allocate_huge_pages(size)
        except OSError as error:
            raise InputError(
                f"{count} slots: the system does not grant {size / GIB:.1f} GiB ({error}); choose fewer slots",
                code="not_enough_memory",
            ) from error
        self._rows = [host[slot * record_bytes : (slot + 1) * record_bytes] for slot in range(count)]
        self._copies = copies

    def rows(self, slots: Sequence[int]) -> list[memoryview]:
        """Return the writable bytes of ``slots``, valid until the next ``move`` or ``swap``."""
        return [self._rows[slot] for slot in slots]

    def fill(self, slots: Sequence[int]) -> Filling:
        """Begin to refill ``slots``, all different; the rows of the filling are the slots themselves."""
        return _HostFilling(self, slots)

    def batch(self, slots: Sequence[int]) -> "HostBatch":
        """Return the records in ``slots``."""
        places = {slot: place for place, slot in enumerate(dict.fromkeys(slots))}
        return HostBatch(tuple(places[slot] for slot in slots), self.rows(slots), self._copies.room)

    def swap(self, slot: int, source: "HostSlots", place: int) -> memoryview:
        """Swap the memory of ``slot`` and of slot ``place`` of ``source``; return the new memory of ``slot``."""
        mine, theirs = self._rows, source._rows  # noqa: SLF001  # the same class
        # One statement without a call: an interrupt cannot leave the same memory in both slots.
        mine[slot], theirs[place] = theirs[place], mine[slot]
        return mine[slot]


class _HostFilling(Filling):
    """A filling that takes records from other host slots without copying them."""

    def __init__(self, owner: HostSlots, slots: Sequence[int]) -> None:
        super().__init__(slots, owner.rows(slots))
        self._owner = owner

    def move(self, slot: int, source: Rows, place: int) -> None:
        if isinstance(source, HostSlots) and source.record_bytes == self._owner.record_bytes:
            self._rows[slot] = self._owner.swap(slot, source, place)
        else:
            super().move(slot, source, place)


class CopyBuffer:
    """Memory for copies of the experts of one batch, allocated at the first use.

    All layers of a store share it, because a batch is valid only until the next fetch of the store.
    """

    def __init__(self, record_bytes: int) -> None:
        self._record_bytes = record_bytes
        self._slab: Slab | None = None

    def room(self, count: int) -> Slab:
        """Return a slab of at least ``count`` slots.

        Raises:
            InputError: there is not enough memory (code "not_enough_memory").
        """
        if self._slab is None or self._slab.count < count:
            self._slab = None  # free the smaller slab before the check
            check_memory(
                f"copying {count} experts for MLX",
                count * self._record_bytes,
                "use kernels=auto, which needs no copies, or shorter prompts",
            )
            self._slab = Slab(count, self._record_bytes)
        return self._slab


@dataclass(frozen=True)
class HostBatch:
    """An ``ExpertBatch`` in memory that MLX cannot use in place.

    The first access to ``slab`` or ``records`` copies the experts into the slab that ``_room`` returns. ``slots`` are
    the rows of the copies in that slab.
    """

    slots: tuple[int, ...]
    _views: Sequence[memoryview]
    _room: Callable[[int], Slab]

    @cached_property
    def slab(self) -> mx.array:
        """A slab with a copy of each expert."""
        views = dict(zip(self.slots, self._views, strict=True))
        slab = self._room(len(views))
        for row, view in zip(slab.rows(list(views)), views.values(), strict=True):
            row[: len(view)] = view
        return slab.array

    @cached_property
    def records(self) -> list[mx.array]:
        """A view of each copy."""
        slab = self.slab
        return [slab[slot : slot + 1].reshape(-1) for slot in self.slots]

    @property
    def host(self) -> list[memoryview]:
        """The bytes of each expert, not copied."""
        return [view.toreadonly() for view in self._views]
