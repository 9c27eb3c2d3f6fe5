"""Rows of a quantized matrix, in elementary operations."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.weights import QuantizedWeight


def embedding(table: QuantizedWeight, indices: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return rows ``indices`` [T] of ``table``, dequantized, [T, columns] of type ``dtype``.

    The CPU selects the rows: on CUDA, MLX compiles a module for each type, for three seconds.
    """
    return _dequantized(table, indices, dtype, mx.cpu)


def by_mlx(table: QuantizedWeight, indices: mx.array, dtype: mx.Dtype) -> mx.array:
    """Compute ``embedding`` on the default device."""
    return _dequantized(table, indices, dtype, None)


def _dequantized(table: QuantizedWeight, indices: mx.array, dtype: mx.Dtype, device: mx.DeviceType | None) -> mx.array:
    assert table.scales is not None
    assert table.biases is not None
    weight, scales, biases = (
        mx.take(part, indices, axis=0, stream=device) for part in (table.weight, table.scales, table.biases)
    )
    return mx.dequantize(
        weight, scales.astype(dtype), biases.astype(dtype), group_size=table.group_size, bits=table.bits
    )
