"""Records in an array of slots, in elementary operations."""

import mlx.core as mx


def fill_slots(slab: mx.array, records: mx.array, slots: mx.array) -> mx.array:
    """Return a copy of ``slab``, uint8 [count, record_bytes], with the first N ``records`` in rows ``slots``, int32 [N]."""
    filled = slab * 1
    filled[slots] = records[: slots.size]
    return filled
