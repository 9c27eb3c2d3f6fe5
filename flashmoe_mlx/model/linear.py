"""Resident matrices, dense or quantised."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels.quantised_matvec import by_mlx


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W^T + bias, for W [out, in]; MLX affine codes, multiplied by ``product``, if ``bits`` is given."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int | None = None
    group_size: int | None = None
    bias: mx.array | None = None
    product: Callable[[mx.array, mx.array, mx.array, mx.array, int, int], mx.array] = by_mlx

    def __call__(self, x: mx.array) -> mx.array:
        """[T, in] -> [T, out]."""
        if self.bits is None:
            y = x @ self.weight.T
        else:
            assert self.scales is not None
            assert self.biases is not None
            assert self.group_size is not None
            y = self.product(x, self.weight, self.scales, self.biases, self.bits, self.group_size)
        return y if self.bias is None else y + self.bias

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(array.nbytes for array in (self.weight, self.scales, self.biases, self.bias) if array is not None)

    def rows(self, indices: mx.array, dtype: mx.Dtype) -> mx.array:
        """Rows of W, as an embedding table: [T] -> [T, in] of type ``dtype``."""
        if self.bits is None:
            return self.weight[indices].astype(dtype)
        assert self.scales is not None
        assert self.biases is not None
        scales, biases = (part[indices].astype(dtype) for part in (self.scales, self.biases))
        return mx.dequantize(self.weight[indices], scales, biases, group_size=self.group_size, bits=self.bits)
