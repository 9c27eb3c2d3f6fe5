"""Records in an array of slots, in elementary operations."""

import mlx.core as mx


def fill_slots(slab: mx.array, records: mx.array, slots: mx.array) -> mx.array:
    """Return a copy of ``slab`` with the first N ``records`` in the rows ``slots``.

    Args:
        slab: uint8 [count, record_bytes].
        records: uint8 [N or more, record_bytes].
        slots: int32 [N].
    """
    filled = slab * 1
    filled[slots] = records[: slots.size]
    return filled
