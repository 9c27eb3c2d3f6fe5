"""Products of the same vectors with several quantized matrices."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from flashmoe_mlx.custom_kernels.weights import QuantizedWeight

Products = Callable[[mx.array, Sequence[QuantizedWeight], mx.array | None], tuple[mx.array, ...]]
"""Products of ``x`` [T, in] with quantized matrices [out, in]: one result [T, out] for each matrix.

The last argument is a residual [T, out] to add to the product with the only matrix, or None.
"""


def one_by_one(product: Callable[..., mx.array]) -> Products:
    """Return ``Products`` that call ``product`` for each matrix; see ``reference.quantized_matvec``."""

    def products(
        x: mx.array, weights: Sequence[QuantizedWeight], residual: mx.array | None = None
    ) -> tuple[mx.array, ...]:
        results = []
        for weight in weights:
            assert weight.scales is not None
            assert weight.biases is not None
            assert weight.bits is not None
            assert weight.group_size is not None
            parts = weight.weight, weight.scales, weight.biases, weight.bits, weight.group_size
            results.append(product(x, *parts, residual))
        return tuple(results)

    return products
