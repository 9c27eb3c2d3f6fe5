"""Resident matrices, dense or quantized."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import mlx.core as mx

from flashmoe_mlx.custom_kernels import NormedMatvec
from flashmoe_mlx.custom_kernels.embedding.reference import by_mlx as embedding_by_mlx
from flashmoe_mlx.custom_kernels.quantized_matvec.mlx import quantized_matvec
from flashmoe_mlx.custom_kernels.quantized_matvec.products import Products, one_by_one
from flashmoe_mlx.custom_kernels.weights import QuantizedWeight

_BY_MLX = one_by_one(quantized_matvec)


@dataclass(frozen=True, slots=True)
class Linear(QuantizedWeight):
    """A linear map, y = x W^T + bias; ``products`` multiplies and ``embedding`` looks up rows if W is quantized."""

    bias: mx.array | None = None
    products: Products = _BY_MLX
    embedding: Callable[[QuantizedWeight, mx.array, mx.Dtype], mx.array] = embedding_by_mlx

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """Map ``x`` [T, in] to [T, out] and add ``residual`` [T, out]."""
        if self.bits is None:
            y = x @ self.weight.T
            y = y if residual is None else residual + y
        else:
            (y,) = self.products(x, (self,), residual)
        return y if self.bias is None else y + self.bias

    def after_norm(
        self, x: mx.array, norm: mx.array, eps: float, normed_matvec: NormedMatvec
    ) -> tuple[mx.array, mx.array]:
        """Normalize ``x`` [1, in] by the factors ``norm`` [in] and map it; return the result and the normalized vector.

        The matrix must be quantized and without a bias.
        """
        return normed_matvec(x, norm, eps, self.weight, self.scales, self.biases, self.bits, self.group_size)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return sum(array.nbytes for array in (self.weight, self.scales, self.biases, self.bias) if array is not None)

    def rows(self, indices: mx.array, dtype: mx.Dtype) -> mx.array:
        """Look up rows of W, such as an embedding table: [T] to [T, in] of type ``dtype``."""
        if self.bits is None:
            return self.weight[indices].astype(dtype)
        return self.embedding(self, indices, dtype)


def join(linears: Sequence[Linear], rows_multiple: int = 16) -> tuple[Linear, list[Linear]] | None:
    """Return one matrix with the rows of all of ``linears``, then rows of zeros, and ``linears`` as views of it.

    Args:
        linears: matrices with the same number of columns.
        rows_multiple: the number of rows of the joint matrix is a multiple of this.

    Returns:
        None if a matrix is dense or has a bias, or if formats differ.
    """
    first = linears[0]
    formats = {
        (linear.bits, linear.group_size, None if linear.scales is None else linear.scales.dtype) for linear in linears
    }
    if first.bits is None or len(formats) > 1 or any(linear.bias is not None for linear in linears):
        return None
    counts = [linear.weight.shape[0] for linear in linears]
    missing = -sum(counts) % rows_multiple

    def joined(parts: Sequence[mx.array]) -> mx.array:
        rest = mx.zeros((missing, parts[0].shape[1]), parts[0].dtype)
        return mx.contiguous(mx.concatenate([*parts, rest]))

    weight = joined([linear.weight for linear in linears])
    scales = joined([linear.scales for linear in linears if linear.scales is not None])
    biases = joined([linear.biases for linear in linears if linear.biases is not None])
    mx.eval(weight, scales, biases)
    views = []
    for end, count in zip(accumulate(counts), counts, strict=True):
        parts = [part[end - count : end] for part in (weight, scales, biases)]
        mx.eval(parts)
        views.append(replace(first, weight=parts[0], scales=parts[1], biases=parts[2]))
    return replace(first, weight=weight, scales=scales, biases=biases), views


def parts_of(row: mx.array, linears: Sequence[Linear]) -> tuple[mx.array, ...]:
    """Return the result [1, out] of each of ``linears`` as a part of the result [1, ...] of ``join(linears)``.

    A joint matrix serves one token: parts of several rows would have to be copied.
    """
    ends = list(accumulate(linear.weight.shape[0] for linear in linears))
    return tuple(mx.split(row, ends, axis=-1)[: len(linears)])


def project_all(linears: Sequence[Linear], x: mx.array) -> tuple[mx.array, ...]:
    """Apply each of ``linears`` to ``x`` [T, in], quantized matrices in one call; returns a [T, out] of each."""
    if any(linear.bits is None for linear in linears):
        return tuple(linear(x) for linear in linears)
    results = zip(linears[0].products(x, linears, None), linears, strict=True)
    outputs = [y if linear.bias is None else y + linear.bias for y, linear in results]
    return tuple(outputs)
