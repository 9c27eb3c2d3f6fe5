"""Slots in memory of large pages, for kernels of the CPU."""

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
    """``count`` slots of ``record_bytes`` in memory that is not MLX's, for the CPU to read.

    In large pages, which MLX's own memory is not made of. MLX can use no other memory in place on CPUs, so its arrays
    are copies, made in ``copies`` when they are asked for; the CPU kernels ask for none.
    """

    def __init__(self, count: int, record_bytes: int, copies: "CopyBuffer") -> None:
        size = count * record_bytes
        check_allocation(count, size)
        self.count = count
        try:
            host = allocate_huge_pages(size)
        except OSError as error:
            raise InputError(
                f"{count} slots: {size / GIB:.1f} GiB are refused here ({error}); choose fewer",
                code="not_enough_memory",
            ) from error
        self._rows = [host[slot * record_bytes : (slot + 1) * record_bytes] for slot in range(count)]
        self._copies = copies

    def rows(self, slots: Sequence[int]) -> list[memoryview]:
        """Return the writable bytes of ``slots``; they are valid until a filling moves records."""
        return [self._rows[slot] for slot in slots]

    def fill(self, slots: Sequence[int]) -> Filling:
        """Begin a filling of distinct ``slots``, whose rows are the slots themselves."""
        return _HostFilling(self, slots)

    def batch(self, slots: Sequence[int]) -> "HostBatch":
        """Return the records in ``slots``."""
        places = {slot: place for place, slot in enumerate(dict.fromkeys(slots))}
        return HostBatch(tuple(places[slot] for slot in slots), self.rows(slots), self._copies.room)

    def swap(self, slot: int, other: "HostSlots", place: int) -> memoryview:
        """Swap the memory of ``slot`` with that of ``place`` of ``other``; return the new memory of ``slot``."""
        mine, theirs = self._rows, other._rows  # noqa: SLF001  # of the same class
        # One statement without a call in it, so that an interrupt cannot leave the same memory in both.
        mine[slot], theirs[place] = theirs[place], mine[slot]
        return mine[slot]


class _HostFilling(Filling):
    """A filling that moves records of other host slots without a copy."""

    def __init__(self, owner: HostSlots, slots: Sequence[int]) -> None:
        super().__init__(slots, owner.rows(slots))
        self._owner = owner

    def move(self, slot: int, source: Rows, place: int) -> None:
        if isinstance(source, HostSlots):
            self._rows[slot] = self._owner.swap(slot, source, place)
        else:
            super().move(slot, source, place)


class CopyBuffer:
    """Memory for the copies of one batch of a store, allocated at the first use and shared by all later batches.

    All slots of a store share it: a batch is valid only until the store's next fetch.
    """

    def __init__(self, record_bytes: int) -> None:
        self._record_bytes = record_bytes
        self._slab: Slab | None = None

    def room(self, count: int) -> Slab:
        """Return a slab of at least ``count`` slots.

        Raises:
            InputError: there is no memory for them.
        """
        if self._slab is None or self._slab.count < count:
            self._slab = None  # the memory of the smaller one is free for the larger one
            check_memory(
                f"copying {count} experts for MLX",
                count * self._record_bytes,
                "use kernels=auto, which reads them in place, or smaller prompts",
            )
            self._slab = Slab(count, self._record_bytes)
        return self._slab


@dataclass(frozen=True)
class HostBatch:
    """An ``ExpertBatch`` in memory that MLX cannot use in place.

    It is copied once, when it is first asked for as an array, into the slab that ``_room`` returns. ``slots`` are the
    rows of the copies there.
    """

    slots: tuple[int, ...]
    _views: Sequence[memoryview]
    _room: Callable[[int], Slab]

    @cached_property
    def slab(self) -> mx.array:
        """CopyBuffer."""
        views = dict(zip(self.slots, self._views, strict=True))
        slab = self._room(len(views))
        for row, view in zip(slab.rows(list(views)), views.values(), strict=True):
            row[:] = view
        return slab.array

    @cached_property
    def records(self) -> list[mx.array]:
        """Views of the copies."""
        slab = self.slab
        return [slab[slot : slot + 1].reshape(-1) for slot in self.slots]

    @property
    def host(self) -> list[memoryview]:
        """The bytes where they are."""
        return [view.toreadonly() for view in self._views]
