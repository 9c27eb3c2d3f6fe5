"""Slots in memory that the CPU and MLX share."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.record import RECORD_ALIGNMENT
from flashmoe_mlx.stores.allocation import use_huge_pages
from flashmoe_mlx.stores.filling import Filling
from flashmoe_mlx.stores.libc import address_of
from flashmoe_mlx.stores.memory import GIB, total_memory

__all__ = ["Slab", "SlabBatch", "check_allocation"]

_LARGEST_COLLAPSED = 2**29
"""Largest slab in bytes that is moved into large pages, which takes 0.1 to 0.2 s for each 100 MB."""
_WORD = 8
"""Smallest alignment of MLX's allocators in bytes."""


class Slab:
    """Slots in one MLX array that the CPU can write.

    The first slot begins at a multiple of 16 KiB, as direct I/O needs; MLX guarantees a smaller alignment.

    Args:
        count: number of slots.
        record_bytes: size of a slot.

    Attributes:
        array: the slots as uint8 [count, record_bytes].
        host: the writable bytes of all slots.

    Raises:
        InputError: there is not enough memory (code "not_enough_memory").
    """

    def __init__(self, count: int, record_bytes: int) -> None:
        size = count * record_bytes
        check_allocation(count, size + RECORD_ALIGNMENT)
        self.count = count
        # An array of words, because MLX stores the length of a dimension in 31 bits.
        everything = mx.zeros(((size + RECORD_ALIGNMENT) // _WORD, _WORD), mx.uint8)
        mx.eval(everything)
        host = memoryview(everything).cast("B")  # type: ignore[arg-type]  # arrays have the buffer protocol
        start = -address_of(host) % RECORD_ALIGNMENT
        self.host: memoryview[int] = host[start : start + size]
        if size <= _LARGEST_COLLAPSED:
            use_huge_pages(self.host)
        self.array: mx.array = everything[start // _WORD : (start + size) // _WORD].reshape(count, record_bytes)
        mx.eval(self.array)
        self._rows = [self.host[slot * record_bytes : (slot + 1) * record_bytes] for slot in range(count)]

    def rows(self, slots: Sequence[int]) -> list[memoryview]:
        """Return the writable bytes of ``slots``."""
        return [self._rows[slot] for slot in slots]

    def fill(self, slots: Sequence[int]) -> Filling:
        """Begin to refill ``slots``, all different; the rows of the filling are the slots themselves."""
        return Filling(slots, self.rows(slots))

    def batch(self, slots: Sequence[int]) -> "SlabBatch":
        """Return the records in ``slots``."""
        return SlabBatch(self.array, tuple(slots), self._rows)


@dataclass(frozen=True)
class SlabBatch:
    """An ``ExpertBatch`` of slots in a slab."""

    slab: mx.array
    slots: tuple[int, ...]
    _rows: Sequence[memoryview]

    @cached_property
    def records(self) -> list[mx.array]:
        """A view of the slab for each expert; a slice is a view, an index would copy."""
        return [self.slab[slot : slot + 1].reshape(-1) for slot in self.slots]

    @property
    def host(self) -> list[memoryview]:
        """The bytes of each expert, not copied."""
        return [self._rows[slot].toreadonly() for slot in self.slots]


def check_allocation(count: int, size: int) -> None:
    """Raise InputError, code "not_enough_memory", unless the system grants ``size`` bytes for ``count`` slots.

    MLX crashes if an allocation fails, so this function maps the memory first, without touching it.
    """
    if size > total_memory():
        raise InputError(
            f"{count} slots need {size / GIB:.1f} GiB, this machine has {total_memory() / GIB:.1f} GiB; "
            "choose fewer slots",
            code="not_enough_memory",
        )
    try:
        mmap.mmap(-1, size).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"{count} slots: the system does not grant {size / GIB:.1f} GiB ({error}); choose fewer slots",
            code="not_enough_memory",
        ) from error
