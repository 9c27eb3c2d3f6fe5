"""Components of records as arrays."""

import mlx.core as mx

from flashmoe_mlx.formats.arrays import MLX_DTYPES
from flashmoe_mlx.formats.record import Component, RecordLayout


def record_views(record: mx.array, layout: RecordLayout) -> dict[str, mx.array]:
    """Return the components of a record, uint8 [record or payload bytes], by name; views where MLX allows."""
    return {c.name: _component(record, c) for c in layout.components}


def dense_projection(parts: dict[str, mx.array], projection: str, layout: RecordLayout) -> mx.array:
    """Return the dense weight [out, in] of ``projection`` in a record's components, in the record's float type."""
    weight = parts[f"{projection}.weight"]
    if layout.bits is None:
        return weight
    return mx.dequantize(
        weight,
        parts[f"{projection}.scales"],
        parts[f"{projection}.biases"],
        group_size=layout.group_size,
        bits=layout.bits,
    )


def _component(record: mx.array, component: Component) -> mx.array:
    raw = record[component.offset : component.offset + component.nbytes]
    return raw.view(MLX_DTYPES[component.dtype]).reshape(component.shape)
