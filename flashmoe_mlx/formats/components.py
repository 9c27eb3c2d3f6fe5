"""The tensors of a record as MLX arrays."""

import mlx.core as mx

from flashmoe_mlx.formats.arrays import MLX_DTYPES
from flashmoe_mlx.formats.record import Component, RecordLayout


def record_views(record: mx.array, layout: RecordLayout) -> dict[str, mx.array]:
    """Return the components of a record by name, as views where MLX allows.

    ``record`` is uint8 [n], where n is at least ``layout.payload_bytes``.
    """
    return {component.name: _view(record, component) for component in layout.components}


def dense_projection(components: dict[str, mx.array], projection: str, layout: RecordLayout) -> mx.array:
    """Return the dense weight [out, in] of one projection, in the float type of the record.

    Args:
        components: the components of a record, as ``record_views`` returns them.
        projection: "gate", "up", or "down".
        layout: the layout of the record.
    """
    weight, form = components[f"{projection}.weight"], layout.format_of(projection)
    if form.bits is None:
        return weight
    return mx.dequantize(
        weight,
        components[f"{projection}.scales"],
        components.get(f"{projection}.biases"),
        group_size=form.group_size,
        bits=form.bits,
        mode=form.mode,
    )


def _view(record: mx.array, component: Component) -> mx.array:
    raw = record[component.offset : component.offset + component.nbytes]
    return raw.view(MLX_DTYPES[component.dtype]).reshape(component.shape)
