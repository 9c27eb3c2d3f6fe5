"""Dense weights to MLX affine codes, and records from one layout to another."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import mlx.core as mx

from flashmoe_mlx.formats.arrays import array_from, bytes_of
from flashmoe_mlx.formats.components import dense_projection, record_views
from flashmoe_mlx.formats.record import PROJECTIONS, RecordLayout
from flashmoe_mlx.pack.least_squares import least_squares


def quantise(dense: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize ``dense`` [..., out, in] to codes, scales and biases with ``mx.quantize``, as ``mlx_lm.convert`` does.

    Scales and biases [..., out, in / group_size] have the type of ``dense``.
    """
    codes, scales, biases = mx.quantize(dense, group_size=group_size, bits=bits)
    return codes, scales, biases


QUANTIZERS: Mapping[str, Callable[[mx.array, int, int], tuple[mx.array, mx.array, mx.array]]] = MappingProxyType(
    {"least_squares": least_squares, "minmax": quantise}
)
"""Ways to choose scales and biases of routed experts."""


def default_quantizer(bits: int) -> str:
    """Return "least_squares" where min-max wastes codes, else "minmax", as in most conversions."""
    return "least_squares" if bits == 2 else "minmax"


def convert_record(
    payload: bytearray, source: RecordLayout, target: RecordLayout, quantiser: str | None = None
) -> memoryview:
    """Convert the payload of a record from layout ``source`` to ``target``; equal layouts are copied.

    ``quantiser`` is one of ``QUANTIZERS``; None for the default of the target's width.
    """
    record = memoryview(bytearray(target.record_bytes))
    if source == target:
        record[: source.payload_bytes] = payload[: source.payload_bytes]
        return record
    assert target.bits is not None
    assert target.group_size is not None
    quantised_by = QUANTIZERS[quantiser or default_quantizer(target.bits)]
    parts = record_views(array_from(payload, "U8", (len(payload),)), source)
    made: dict[str, mx.array] = {}
    for projection in PROJECTIONS:
        quantised = quantised_by(dense_projection(parts, projection, source), target.bits, target.group_size)
        made |= zip((f"{projection}.{part}" for part in ("weight", "scales", "biases")), quantised, strict=True)
    for component in target.components:
        record[component.offset : component.offset + component.nbytes] = bytes_of(made[component.name])
    return record
