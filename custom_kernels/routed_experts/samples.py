"""Random inputs of routed experts."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.expert_format import ExpertFormat, expert_format
from flashmoe_mlx.custom_kernels.random_inputs import Geometry, RandomInputs
from flashmoe_mlx.custom_kernels.weights import ExpertWeights
from flashmoe_mlx.formats.record import AFFINE, MatrixFormat, RecordLayout


@dataclass(frozen=True)
class ExpertInputs:
    """Arguments of ``routed_experts.reference.routed_experts``.

    Attributes:
        x: [T, hidden].
        slab: records, uint8 [records, record_bytes].
        rows: row of ``slab`` of each expert, int32 [T, K]; -1 for a choice to skip.
        routing_weights: f32 [T, K], or [T, K + 1] with a shared expert.
        form: format of the records.
        shared: an expert for every token, or None.
        payload_bytes: size of a record without its padding.
    """

    x: mx.array
    slab: mx.array
    rows: mx.array
    routing_weights: mx.array
    form: ExpertFormat
    shared: ExpertWeights | None
    payload_bytes: int

    @property
    def records(self) -> list[memoryview]:
        """Copies of the records in the host's memory."""
        return [memoryview(row) for row in np.array(self.slab)]


def expert_inputs(
    geometry: Geometry,
    dtype: mx.Dtype,
    *,
    bits: int | tuple[int, int, int] = 4,
    group_size: int | tuple[int, int, int] = 64,
    tokens: int = 1,
    k: int = 4,
    shared: bool = True,
    seed: int = 0,
    scales: mx.Dtype | None = None,
) -> ExpertInputs:
    """Draw ``k`` experts for each token out of a slab; leave one choice out.

    Args:
        geometry: sizes of the experts.
        dtype: type of activations.
        bits: width of a code, or those of gate, up and down.
        group_size: codes that share a scale and a bias, or those of gate, up and down.
        tokens: number of tokens.
        k: experts per token.
        shared: whether to draw a shared expert.
        seed: seed of the random numbers.
        scales: type of scales and biases; None stands for ``dtype``.
    """
    inputs = RandomInputs(dtype, seed, scales)
    form, payload_bytes = format_of(geometry, inputs.scales, bits, group_size)
    rows = np.random.default_rng(seed).integers(0, k + 2, (tokens, k), np.int32)
    if tokens * k > 4:
        rows[-1, 0] = -1
    slab = inputs.slab(form, k + 2)
    x = inputs.normal(tokens, geometry.hidden)
    routing_weights = mx.softmax(inputs.normal(tokens, k + shared, dtype=mx.float32), axis=-1)
    own = None
    if shared:
        shapes = ((geometry.intermediate, geometry.hidden),) * 2 + ((geometry.hidden, geometry.intermediate),)
        formats = zip(shapes, _three(bits), _three(group_size), strict=True)
        own = ExpertWeights(*(inputs.quantized(*shape, width, group) for shape, width, group in formats))
    mx.eval(slab, routing_weights)
    return ExpertInputs(x, slab, mx.array(rows), routing_weights, form, own, payload_bytes)


def format_of(
    geometry: Geometry,
    scales: mx.Dtype,
    bits: int | tuple[int, int, int],
    group_size: int | tuple[int, int, int],
) -> tuple[ExpertFormat, int]:
    """Return the format of records with experts of ``geometry``, and the size of a record without its padding.

    Args:
        geometry: sizes of the experts.
        scales: type of scales and biases.
        bits: width of a code, or those of gate, up and down.
        group_size: codes that share a scale and a bias, or those of gate, up and down.
    """
    scale_type = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint8: "U8"}[scales]
    mode = "mxfp4" if scales == mx.uint8 else AFFINE
    formats = (MatrixFormat(*own, scale_type, mode) for own in zip(_three(bits), _three(group_size), strict=True))
    layout = RecordLayout(geometry.hidden, geometry.intermediate, *formats)
    form = expert_format(layout, (mode,))
    assert form is not None
    return form, layout.payload_bytes


def _three(value: int | tuple[int, int, int]) -> tuple[int, int, int]:
    return (value,) * 3 if isinstance(value, int) else value
