"""Random inputs for kernels, of any size and format: for checks at load, ``task=doctor`` and tests."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels.attention.reference import AttentionWeights
from flashmoe_mlx.custom_kernels.expert_mlp.reference import ExpertWeights, Weight
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import DeltaWeights
from flashmoe_mlx.custom_kernels.routed_experts.format import PROJECTIONS, ExpertFormat, expert_format
from flashmoe_mlx.formats.record import RecordLayout


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that kernels see."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int


GEOMETRIES = {
    "397B": Geometry(4096, 1024, 32, 2, 256, 64, 16, 64, 128, 128),
    "122B": Geometry(3072, 1024, 32, 2, 256, 64, 16, 64, 128, 128),
    "35B": Geometry(2048, 512, 16, 2, 256, 64, 16, 32, 128, 128),
    "small": Geometry(192, 96, 6, 2, 32, 8, 2, 6, 32, 48),
}


class Inputs:
    """Random arrays, reproducible by ``seed``: activations of ``dtype``, scales and biases of ``scales``."""

    def __init__(self, dtype: mx.Dtype, seed: int, scales: mx.Dtype | None = None) -> None:
        self.dtype = dtype
        self.scales = scales or dtype
        self._random = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: mx.Dtype | None = None) -> mx.array:
        """Draw from a normal distribution; ``dtype`` if not that of activations."""
        values = mean + scale * self._random.standard_normal(shape, np.float32)
        array = mx.array(values.astype(np.float32)).astype(dtype or self.dtype)
        mx.eval(array)
        return array

    def words(self, *shape: int) -> mx.array:
        """Draw uint32, all values alike."""
        return mx.array(self._random.integers(0, 2**32, shape, np.uint32))

    def quantised(self, rows: int, columns: int, bits: int, group_size: int) -> Weight:
        """Draw a quantised matrix whose products with normal vectors have values around 1."""
        groups = (rows, columns // group_size)
        return Weight(
            self.words(rows, columns * bits // 32),
            self.normal(*groups, scale=columns**-0.5 / 2**bits, dtype=self.scales),
            self.normal(*groups, scale=columns**-0.5, dtype=self.scales),
            bits,
            group_size,
        )

    def like(self, weight: Weight, rows: int | None = None) -> Weight:
        """Draw a quantised matrix of the shape and format of ``weight``, with ``rows`` rows if given."""
        assert weight.scales is not None
        assert weight.bits is not None
        assert weight.group_size is not None
        own_rows, groups = weight.scales.shape
        drawn = Inputs(self.dtype, int(self._random.integers(2**31)), weight.scales.dtype)
        return drawn.quantised(rows or own_rows, groups * weight.group_size, weight.bits, weight.group_size)

    def record(self, form: ExpertFormat) -> npt.NDArray[np.uint8]:
        """Draw the record of an expert."""
        record = np.zeros(form.record_bytes, np.uint8)
        drawn = Inputs(self.dtype, int(self._random.integers(2**31)), form.dtype)
        for projection in PROJECTIONS:
            rows, columns = form.shape(projection)
            weight = drawn.quantised(rows, columns, form.bits, form.group_size)
            for part in ("weight", "scales", "biases"):
                raw = np.array(getattr(weight, part).reshape(-1).view(mx.uint8))
                start = form.offsets[f"{projection}.{part}"]
                record[start : start + raw.size] = raw
        return record

    def slab(self, form: ExpertFormat, experts: int) -> mx.array:
        """Draw a slab, uint8 [experts, record bytes]."""
        slab = mx.array(np.stack([self.record(form) for _ in range(experts)]))
        mx.eval(slab)
        return slab


@dataclass(frozen=True)
class ExpertInputs:
    """What ``custom_kernels.routed_experts`` takes; ``records`` are the rows of ``slab`` as the CPU sees them."""

    x: mx.array
    slab: mx.array
    rows: mx.array
    shares: mx.array
    form: ExpertFormat
    shared: ExpertWeights | None
    payload_bytes: int

    @property
    def records(self) -> list[memoryview]:
        """The records as bytes, copied."""
        return [memoryview(row) for row in np.array(self.slab)]


def expert_inputs(
    geometry: Geometry,
    dtype: mx.Dtype,
    *,
    bits: int = 4,
    group_size: int = 64,
    tokens: int = 1,
    k: int = 4,
    shared: bool = True,
    seed: int = 0,
    scales: mx.Dtype | None = None,
) -> ExpertInputs:
    """Draw K experts for each token out of a slab, one choice left out, with a shared expert or without.

    ``scales``: the type of scales and biases, if it is not ``dtype``.
    """
    inputs = Inputs(dtype, seed, scales)
    scale_type = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16"}[inputs.scales]
    layout = RecordLayout(geometry.hidden, geometry.intermediate, bits, group_size, scale_type)
    form = expert_format(layout)
    assert form is not None
    rows = np.random.default_rng(seed).integers(0, k + 2, (tokens, k), np.int32)
    if tokens * k > 4:
        rows[-1, 0] = -1
    slab = inputs.slab(form, k + 2)
    x = inputs.normal(tokens, geometry.hidden)
    shares = mx.softmax(inputs.normal(tokens, k + shared, dtype=mx.float32), axis=-1)
    own = None
    if shared:
        shapes = ((geometry.intermediate, geometry.hidden),) * 2 + ((geometry.hidden, geometry.intermediate),)
        own = ExpertWeights(*(inputs.quantised(*shape, bits, group_size) for shape in shapes))
    mx.eval(slab, shares)
    return ExpertInputs(x, slab, mx.array(rows), shares, form, own, layout.payload_bytes)


@dataclass(frozen=True)
class DeltaInputs:
    """What ``custom_kernels.gated_delta_net`` takes; ``arrays`` are qkv, z, b and a."""

    arrays: tuple[mx.array, mx.array, mx.array, mx.array]
    weights: DeltaWeights
    past: mx.array
    state: mx.array


def delta_inputs(
    geometry: Geometry, dtype: mx.Dtype, *, tokens: int = 1, seed: int = 0, taps: int = 4, eps: float = 1e-6
) -> DeltaInputs:
    """Draw tokens that follow others."""
    inputs = Inputs(dtype, seed)
    heads, value_width = geometry.value_heads, geometry.value_heads * geometry.value_dim
    channels = 2 * geometry.key_heads * geometry.key_dim + value_width
    weights = DeltaWeights(
        geometry.key_heads,
        heads,
        geometry.key_dim,
        geometry.value_dim,
        inputs.normal(channels, taps, 1, scale=0.5),
        inputs.normal(heads, dtype=mx.float32),
        inputs.normal(heads, dtype=mx.float32),
        inputs.normal(geometry.value_dim, scale=0.2, mean=1.0),
        eps,
    )
    return DeltaInputs(
        (
            inputs.normal(tokens, channels),
            inputs.normal(tokens, value_width),
            inputs.normal(tokens, heads),
            inputs.normal(tokens, heads),
        ),
        weights,
        inputs.normal(taps - 1, channels),
        inputs.normal(1, heads, geometry.value_dim, geometry.key_dim, scale=0.3, dtype=mx.float32),
    )


@dataclass(frozen=True)
class AttentionInputs:
    """What ``custom_kernels.attention`` takes; ``arrays`` are q_and_gate, k and v."""

    arrays: tuple[mx.array, mx.array, mx.array]
    weights: AttentionWeights
    keys: mx.array
    values: mx.array


def attention_inputs(
    geometry: Geometry,
    dtype: mx.Dtype,
    *,
    context: int,
    tokens: int = 1,
    seed: int = 0,
    theta: float = 1e7,
    eps: float = 1e-6,
) -> AttentionInputs:
    """Draw tokens and a filled cache with room for ``context`` tokens."""
    inputs = Inputs(dtype, seed)
    weights = AttentionWeights(
        geometry.heads,
        geometry.kv_heads,
        geometry.head_dim,
        geometry.rotary_dim,
        theta,
        inputs.normal(geometry.head_dim, scale=0.2, mean=1.0),
        inputs.normal(geometry.head_dim, scale=0.2, mean=1.0),
        eps,
    )
    width, kv_width = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    room = (1, geometry.kv_heads, -(-context // 256) * 256, geometry.head_dim)
    return AttentionInputs(
        (inputs.normal(tokens, 2 * width), inputs.normal(tokens, kv_width), inputs.normal(tokens, kv_width)),
        weights,
        inputs.normal(*room),
        inputs.normal(*room),
    )
