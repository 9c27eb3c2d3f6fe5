"""The type that references compute in."""

import mlx.core as mx


def wide(x: mx.array) -> mx.array:
    """``x`` in f32, or as it is in f64, so that a reference given f64 (on a CPU) is one in f64 throughout."""
    return x if x.dtype == mx.float64 else x.astype(mx.float32)
