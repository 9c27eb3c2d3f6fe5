"""New records in an array of slots, in elementary operations; makes a new array."""

import mlx.core as mx


def fill_slots(slab: mx.array, records: mx.array, slots: mx.array) -> mx.array:
    """``slab``, uint8 [count, record bytes], with its rows ``slots``, int32 [N], from the first N of ``records``."""
    filled = slab * 1
    filled[slots] = records[: slots.size]
    return filled
