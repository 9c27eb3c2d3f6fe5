"""Resident matrices, dense or quantised."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels.quantized_matvec.mlx import quantized_matvec
from flashmoe_mlx.custom_kernels.quantized_matvec.products import Products, one_by_one
from flashmoe_mlx.custom_kernels.weights import QuantizedWeight

_BY_MLX = one_by_one(quantized_matvec)


@dataclass(frozen=True, slots=True)
class Linear(QuantizedWeight):
    """y = x W^T + bias; ``products`` multiplies if W is quantised."""

    bias: mx.array | None = None
    products: Products = _BY_MLX

    def __call__(self, x: mx.array, before: mx.array | None = None) -> mx.array:
        """[T, in] -> [T, out], added to ``before``."""
        if self.bits is None:
            y = x @ self.weight.T
            y = y if before is None else before + y
        else:
            (y,) = self.products(x, (self,), before)
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


def together(linears: Sequence[Linear], x: mx.array) -> tuple[mx.array, ...]:
    """What each of ``linears`` makes of ``x`` [T, in]; quantised ones share a call."""
    if any(one.bits is None for one in linears):
        return tuple(one(x) for one in linears)
    results = zip(linears[0].products(x, linears, None), linears, strict=True)
    return tuple(y if one.bias is None else y + one.bias for y, one in results)
