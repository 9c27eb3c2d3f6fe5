"""The matrices of some experts, dense, in elementary operations."""

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.routed_experts.format import ExpertFormat


def dense_experts(
    slab: mx.array, rows: mx.array, form: ExpertFormat, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """Gate, up and down of the experts in ``rows``, int32 [E], of ``slab``, uint8 [rows, record bytes].

    Returns:
        ``dtype`` [E, intermediate, hidden], the same, and [E, hidden, intermediate].
    """
    experts = [form.expert(slab[row : row + 1].reshape(-1)) for row in np.array(rows)]
    gate, up, down = (
        mx.stack([getattr(expert, name).dense() for expert in experts]).astype(dtype) for name in ("gate", "up", "down")
    )
    return gate, up, down
