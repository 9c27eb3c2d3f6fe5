"""Slots: room for records in one MLX array, which reads go straight into."""

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import mlx.core as mx

from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.custom_kernels.fill_slots import fill_slots
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.expert_store import ExpertBatch
from flashmoe_mlx.pack.record import RECORD_ALIGNMENT
from flashmoe_mlx.storage.memory import GIB, address_of, own_memory, slots_on_gpu, total_memory, use_huge_pages

_COLLAPSED = 2**29
"""Bytes up to which slots are made of large pages at once; it takes a tenth of a second or two for each 100 MB."""
_WORD = 8
"""Bytes; what every allocator of MLX aligns to at least."""


class Slots(Protocol):
    """Room for ``count`` records, wherever kernels read them."""

    count: int

    def rows(self, slots: Sequence[int]) -> Sequence[memoryview]:
        """Where to write the records of ``slots``, writable bytes each; ``commit`` them when they are there."""
        ...

    def commit(self, slots: Sequence[int]) -> None:
        """The rows that were given out last for ``slots`` are complete."""
        ...

    def batch(self, slots: Sequence[int]) -> ExpertBatch:
        """The records in ``slots``."""
        ...


class Slab:
    """``count`` slots of ``record_bytes`` in memory that the CPU and MLX share.

    ``array`` is uint8 [count, record_bytes]. The first slot begins at a multiple of 16 KiB, so that files opened for
    direct I/O can be read into it; MLX itself aligns to less.
    """

    def __init__(self, count: int, record_bytes: int) -> None:
        size = count * record_bytes
        _refuse_what_cannot_be_allocated(count, size + RECORD_ALIGNMENT)
        self.count = count
        # In words, because MLX counts along a dimension with 31 bits.
        everything = mx.zeros(((size + RECORD_ALIGNMENT) // _WORD, _WORD), mx.uint8)
        mx.eval(everything)
        host = memoryview(everything).cast("B")  # type: ignore[arg-type]  # arrays have the buffer protocol
        start = -address_of(host) % RECORD_ALIGNMENT
        self.host = host[start : start + size]
        if size <= _COLLAPSED:
            use_huge_pages(self.host)
        self.array = everything[start // _WORD : (start + size) // _WORD].reshape(count, record_bytes)
        mx.eval(self.array)
        self._rows = [self.host[slot * record_bytes : (slot + 1) * record_bytes] for slot in range(count)]

    def rows(self, slots: Sequence[int]) -> list[memoryview]:
        """The bytes of ``slots``, writable."""
        return [self._rows[slot] for slot in slots]

    def commit(self, slots: Sequence[int]) -> None:
        """Nothing to do: what is written is where kernels read."""

    def batch(self, slots: Sequence[int]) -> "SlabBatch":
        """The records in ``slots``."""
        return SlabBatch(self.array, tuple(slots), self._rows)


@dataclass(frozen=True)
class SlabBatch:
    """An ``ExpertBatch`` of slots of a slab."""

    slab: mx.array
    slots: tuple[int, ...]
    _rows: Sequence[memoryview]

    @cached_property
    def records(self) -> list[mx.array]:
        """Views of the slab: a slice is one, an index would copy."""
        return [self.slab[slot : slot + 1].reshape(-1) for slot in self.slots]

    @property
    def host(self) -> list[memoryview]:
        """The same bytes for the CPU."""
        return [self._rows[slot].toreadonly() for slot in self.slots]


class HostSlots:
    """``count`` slots of ``record_bytes`` in memory that is not MLX's, for the CPU to read.

    In large pages, which MLX's own memory is not made of. MLX can use no other memory in place on CPUs, so what is
    asked for as an array is copied; the CPU kernels ask for none.
    """

    def __init__(self, count: int, record_bytes: int) -> None:
        size = count * record_bytes
        _refuse_what_cannot_be_allocated(count, size)
        self.count = count
        self._record_bytes = record_bytes
        try:
            host = own_memory(size)
        except OSError as error:
            raise InputError(f"{count} slots: {size / GIB:.1f} GiB are refused here ({error}); choose fewer") from error
        self._rows = [host[slot * record_bytes : (slot + 1) * record_bytes] for slot in range(count)]
        self._copies: Slab | None = None

    def rows(self, slots: Sequence[int]) -> list[memoryview]:
        """The bytes of ``slots``, writable."""
        return [self._rows[slot] for slot in slots]

    def commit(self, slots: Sequence[int]) -> None:
        """Nothing to do: what is written is where kernels read."""

    def batch(self, slots: Sequence[int]) -> "HostBatch":
        """The records in ``slots``."""
        places = {slot: place for place, slot in enumerate(dict.fromkeys(slots))}
        return HostBatch(tuple(places[slot] for slot in slots), self.rows(slots), self._room)

    def exchange(self, slot: int, other: "HostSlots", place: int) -> None:
        """Change the memory of ``slot`` for that of the ``place`` of another: records move without a copy."""
        mine, theirs = self._rows, other._rows  # noqa: SLF001  # of the same class
        # One statement without a call in it, so that an interrupt cannot leave the same memory in both.
        mine[slot], theirs[place] = theirs[place], mine[slot]

    def _room(self, count: int) -> Slab:
        if self._copies is None or self._copies.count < count:
            self._copies = Slab(count, self._record_bytes)
        return self._copies


@dataclass(frozen=True)
class HostBatch:
    """An ``ExpertBatch`` in memory that MLX cannot use in place: it is copied, once, into what ``_room`` gives.

    ``slots`` are the rows that the copies have there.
    """

    slots: tuple[int, ...]
    _views: Sequence[memoryview]
    _room: Callable[[int], Slab]

    @cached_property
    def slab(self) -> mx.array:
        """Copies."""
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


class GpuSlots:
    """``count`` slots of ``record_bytes`` in the memory of an NVIDIA GPU; at most ``at_once`` are written at a time.

    Records are read into memory that the CPU can reach and copied from there. MLX would move the slots there as well
    as soon as anybody asked for their bytes, so ``host`` of a batch is a copy.
    """

    def __init__(self, count: int, record_bytes: int, at_once: int) -> None:
        self.count = count
        self._arriving = Slab(at_once, record_bytes)
        self._array = mx.zeros((count, record_bytes), mx.uint8)
        mx.eval(self._array)

    def rows(self, slots: Sequence[int]) -> list[memoryview]:
        """Where records arrive, in the order of ``slots``."""
        return self._arriving.rows(range(len(slots)))

    def commit(self, slots: Sequence[int]) -> None:
        """Copy what has arrived to ``slots``."""
        fill_slots(self._array, self._arriving.array, mx.array(list(slots), mx.int32))

    def batch(self, slots: Sequence[int]) -> "GpuBatch":
        """The records in ``slots``."""
        return GpuBatch(self._array, tuple(slots))


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


def make_slots(count: int, record_bytes: int, at_once: int) -> Slots:
    """``count`` slots where kernels of the default device read them best; at most ``at_once`` are written at a time."""
    if slots_on_gpu():
        return GpuSlots(count, record_bytes, at_once)
    return host_slots(count, record_bytes)


def host_slots(count: int, record_bytes: int) -> Slab | HostSlots:
    """``count`` slots in memory that the CPU can reach."""
    # Metal reads MLX's memory in place; so do MLX's own operations, where there are no kernels for this CPU.
    if mx.metal.is_available() or native.extension() is None:
        return Slab(count, record_bytes)
    return HostSlots(count, record_bytes)


def _refuse_what_cannot_be_allocated(count: int, size: int) -> None:
    """MLX crashes where memory is refused: ask the system first, without touching what it gives."""
    if size > total_memory():
        raise InputError(
            f"{count} slots: need {size / GIB:.1f} GiB, this machine has {total_memory() / GIB:.1f} GiB; choose fewer"
        )
    try:
        mmap.mmap(-1, size).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"{count} slots: {size / GIB:.1f} GiB are refused here ({error}); choose fewer") from error
