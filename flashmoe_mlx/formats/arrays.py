"""Conversion between the bytes of a file and MLX arrays, without rounding."""

import mlx.core as mx
import numpy as np

MLX_DTYPES = {"U8": mx.uint8, "U32": mx.uint32, "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
"""MLX types by their safetensors names."""


def array_from(data: bytes | bytearray | memoryview, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """Copy ``data`` into an array of ``shape``; ``dtype`` is a safetensors name from ``MLX_DTYPES``."""
    return mx.array(np.frombuffer(data, np.uint8)).view(MLX_DTYPES[dtype]).reshape(shape)


def bytes_of(array: mx.array) -> memoryview:
    """Evaluate ``array`` and return its bytes in row-major order."""
    return memoryview(mx.contiguous(array)).cast("B")  # type: ignore[arg-type]  # arrays have the buffer protocol
