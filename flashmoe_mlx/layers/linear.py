"""Resident matrices, dense or quantized."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels.quantized_matvec.mlx import quantized_matvec
from flashmoe_mlx.custom_kernels.quantized_matvec.products import Products, one_by_one
from flashmoe_mlx.custom_kernels.weights import QuantizedWeight

_BY_MLX = one_by_one(quantized_matvec)


@dataclass(frozen=True, slots=True)
class Linear(QuantizedWeight):
    """A linear map, y = x W^T + bias; ``products`` multiplies if W is quantized."""

    bias: mx.array | None = None
    products: Products = _BY_MLX

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """Map ``x`` [T, in] to [T, out] and add ``residual`` [T, out]."""
        if self.bits is None:
            y = x @ self.weight.T
            y = y if residual is None else residual + y
        else:
            (y,) = self.products(x, (self,), residual)
        return y if self.bias is None else y + self.bias

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return sum(array.nbytes for array in (self.weight, self.scales, self.biases, self.bias) if array is not None)

    def rows(self, indices: mx.array, dtype: mx.Dtype) -> mx.array:
        """Look up rows of W, as of an embedding table: [T] to [T, in] of type ``dtype``."""
        if self.bits is None:
            return self.weight[indices].astype(dtype)
        assert self.scales is not None
        assert self.biases is not None
        scales, biases = (part[indices].astype(dtype) for part in (self.scales, self.biases))
        return mx.dequantize(self.weight[indices], scales, biases, group_size=self.group_size, bits=self.bits)


def project_all(linears: Sequence[Linear], x: mx.array) -> tuple[mx.array, ...]:
    """Apply each of ``linears`` to ``x`` [T, in], quantized matrices in one call; returns a [T, out] of each."""
    if any(linear.bits is None for linear in linears):
        return tuple(linear(x) for linear in linears)
    results = zip(linears[0].products(x, linears, None), linears, strict=True)
    return tuple(y if linear.bias is None else y + linear.bias for y, linear in results)
