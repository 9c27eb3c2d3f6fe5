"""Random arrays for kernels, of any size and format: for checks at load, ``task=doctor`` and tests."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels.expert_format import PROJECTIONS, ExpertFormat
from flashmoe_mlx.custom_kernels.weights import ExpertWeights, QuantizedWeight, format_name
from flashmoe_mlx.formats.record import AFFINE

__all__ = ["GEOMETRIES", "Geometry", "RandomInputs"]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that decide the shapes of kernels' inputs."""

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
"""The sizes of Qwen3.5 models, by their number of parameters, and of a small model for tests."""


class RandomInputs:
    """Random arrays, reproducible by a seed.

    Args:
        dtype: type of activations.
        seed: seed of the random numbers.
        scales: type of scales and biases; None stands for ``dtype``, and uint8 for the exponents of mxfp4.
    """

    def __init__(self, dtype: mx.Dtype, seed: int, scales: mx.Dtype | None = None) -> None:
        self.dtype = dtype
        self.scales: mx.Dtype = scales or dtype
        self._random = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: mx.Dtype | None = None) -> mx.array:
        """Draw from a normal distribution; ``dtype`` defaults to the type of activations."""
        values = mean + scale * self._random.standard_normal(shape, np.float32)
        array = mx.array(values.astype(np.float32)).astype(dtype or self.dtype)
        mx.eval(array)
        return array

    def words(self, *shape: int) -> mx.array:
        """Draw uint32 from a uniform distribution over all values."""
        return mx.array(self._random.integers(0, 2**32, shape, np.uint32))

    def quantized(self, rows: int, columns: int, bits: int, group_size: int) -> QuantizedWeight:
        """Draw a quantized matrix whose products with normal vectors have values around 1.

        Args:
            rows: rows of the matrix.
            columns: columns of the matrix.
            bits: width of a code.
            group_size: codes that share a scale and a bias.
        """
        groups = (rows, columns // group_size)
        if self.scales == mx.uint8:
            mode, power = format_name(bits, group_size, mx.uint8), 126 - round(np.log2(columns) / 2)
            scales = mx.array(self._random.integers(power - 2, power + 1, groups, np.uint8))
            return QuantizedWeight(self.words(rows, columns * bits // 32), scales, None, bits, group_size, mode=mode)
        return QuantizedWeight(
            self.words(rows, columns * bits // 32),
            self.normal(*groups, scale=columns**-0.5 / 2**bits, dtype=self.scales),
            self.normal(*groups, scale=columns**-0.5, dtype=self.scales),
            bits,
            group_size,
        )

    def like(self, weight: QuantizedWeight, rows: int | None = None, columns: int | None = None) -> QuantizedWeight:
        """Draw a quantized matrix in the format of ``weight``, by default also of its size."""
        assert weight.scales is not None
        assert weight.bits is not None
        assert weight.group_size is not None
        drawn = RandomInputs(self.dtype, int(self._random.integers(2**31)), weight.scales.dtype)
        size = rows or len(weight.weight), columns or weight.columns
        return drawn.quantized(*size, weight.bits, weight.group_size)

    def expert_like(self, expert: ExpertWeights) -> ExpertWeights:
        """Draw an expert of the shape and format of ``expert``."""
        return ExpertWeights(*(self.like(matrix) for matrix in expert.matrices))

    def record(self, form: ExpertFormat) -> npt.NDArray[np.uint8]:
        """Draw the record of an expert, [record_bytes]."""
        record = np.zeros(form.record_bytes, np.uint8)
        for projection in PROJECTIONS:
            own = form.format_of(projection)
            drawn = RandomInputs(self.dtype, int(self._random.integers(2**31)), own.dtype)
            weight = drawn.quantized(*form.shape(projection), own.bits, own.group_size)
            for part in ("weight", "scales", "biases")[: 3 if own.mode == AFFINE else 2]:
                raw = np.array(getattr(weight, part).reshape(-1).view(mx.uint8))
                start = form.offsets[f"{projection}.{part}"]
                record[start : start + raw.size] = raw
        return record

    def slab(self, form: ExpertFormat, experts: int) -> mx.array:
        """Draw a slab of records, uint8 [experts, record_bytes]."""
        slab = mx.array(np.stack([self.record(form) for _ in range(experts)]))
        mx.eval(slab)
        return slab
