"""The types that models and references compute in."""

import mlx.core as mx


def wide(x: mx.array) -> mx.array:
    """``x`` in f32, or as it is in f64, so that a reference given f64 (on a CPU) is one in f64 throughout."""
    return x if x.dtype == mx.float64 else x.astype(mx.float32)


def activation_type() -> mx.Dtype:
    """Return the type of activations on the default device: bf16 on a GPU, f32 on a CPU.

    MLX's CPU kernels add up in the type of the activations: bf16 would lose whole digits there.
    """
    return mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
