"""The types in which models and references compute."""

import mlx.core as mx

__all__ = ["activation_type", "widen"]


def widen(x: mx.array) -> mx.array:
    """Return ``x`` in f32; in f64 if it is f64, so that a reference computes in f64 throughout (on a CPU)."""
    return x if x.dtype == mx.float64 else x.astype(mx.float32)


def activation_type() -> mx.Dtype:
    """Return the type of activations on the default device: bf16 on a GPU, f32 on a CPU.

    MLX's CPU kernels accumulate in the type of the activations; bf16 would lose whole digits there.
    """
    return mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
