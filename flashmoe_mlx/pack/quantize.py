"""Quantization of dense weights, and conversion of records between layouts."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import mlx.core as mx

from flashmoe_mlx.formats.arrays import array_from, bytes_of
from flashmoe_mlx.formats.components import dense_projection, record_views
from flashmoe_mlx.formats.record import PROJECTIONS, RecordLayout
from flashmoe_mlx.pack.least_squares import least_squares


def quantize(dense: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize ``dense`` [..., out, in] with ``mx.quantize``, as ``mlx_lm.convert`` does.

    Returns codes as uint32 [..., out, in * bits / 32], and scales and biases [..., out, in / group_size] of the type of
    ``dense``.
    """
    codes, scales, biases = mx.quantize(dense, group_size=group_size, bits=bits)
    return codes, scales, biases


QUANTIZERS: Mapping[str, Callable[[mx.array, int, int], tuple[mx.array, mx.array, mx.array]]] = MappingProxyType(
    {"least_squares": least_squares, "minmax": quantize}
)
"""Functions that quantize the weights of routed experts, by the value of ``quantiser=``."""


BY_WIDTH = "by_width"
"""The value of ``quantiser`` in manifests for variants of several widths, each with its default quantizer."""


def default_quantizer(bits: int) -> str:
    """Return "least_squares" for 2 bits, where min-max wastes codes, and otherwise "minmax", as most converters use."""
    return "least_squares" if bits == 2 else "minmax"


def convert_record(
    payload: bytearray, source: RecordLayout, target: RecordLayout, quantizer: str | None = None
) -> memoryview:
    """Convert a record to another layout; return it with its padding.

    Args:
        payload: the bytes of the record.
        source: the layout of ``payload``.
        target: the new layout; projections whose formats differ from ``source`` must be quantized.
        quantizer: a key of ``QUANTIZERS``; None or ``BY_WIDTH`` for the default of each width.
    """
    record = memoryview(bytearray(target.record_bytes))
    if source == target:
        record[: source.payload_bytes] = payload[: source.payload_bytes]
        return record
    components = record_views(array_from(payload, "U8", (len(payload),)), source)
    converted: dict[str, mx.array] = {}
    for projection in PROJECTIONS:
        form = target.format_of(projection)
        names = [f"{projection}.{part}" for part in ("weight", "scales", "biases")]
        if form == source.format_of(projection):
            converted |= {name: components[name] for name in names if name in components}
            continue
        assert form.bits is not None
        assert form.group_size is not None
        chosen = default_quantizer(form.bits) if quantizer in (None, BY_WIDTH) else quantizer
        quantized = QUANTIZERS[chosen](dense_projection(components, projection, source), form.bits, form.group_size)
        converted |= zip(names, quantized, strict=True)
    for component in target.components:
        record[component.offset : component.offset + component.nbytes] = bytes_of(converted[component.name])
    return record
