"""The matrices of some experts, dequantized, in elementary operations."""

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.expert_format import ExpertFormat

Matrices = tuple[mx.array, mx.array, mx.array]


def dense_experts(slab: mx.array, rows: mx.array, form: ExpertFormat, dtype: mx.Dtype) -> Matrices:
    """Return gate, up and down of some experts as dense matrices.

    Args:
        slab: records, uint8 [records, record_bytes].
        rows: rows of ``slab``, int32 [E].
        form: format of the records.
        dtype: type of the results.

    Returns:
        Gate and up [E, intermediate, hidden], down [E, hidden, intermediate].
    """
    experts = [form.expert(slab[row : row + 1].reshape(-1)) for row in np.array(rows)]
    gate, up, down = (
        mx.stack([getattr(expert, name).dense() for expert in experts]).astype(dtype) for name in ("gate", "up", "down")
    )
    return gate, up, down
