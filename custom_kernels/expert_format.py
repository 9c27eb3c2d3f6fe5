"""The places of an expert's matrices in its record."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from flashmoe_mlx.custom_kernels.weights import ExpertWeights, QuantizedWeight
from flashmoe_mlx.formats.arrays import MLX_DTYPES
from flashmoe_mlx.formats.record import PROJECTIONS, RecordLayout

__all__ = ["PROJECTIONS", "ExpertFormat", "expert_format"]


@dataclass(frozen=True)
class ExpertFormat:
    """The format of records whose matrices are in MLX's affine format.

    Attributes:
        hidden_size: width of a token's vector.
        intermediate_size: width between the expert's matrices.
        bits: width of a code.
        group_size: codes that share a scale and a bias.
        dtype: type of scales and biases.
        record_bytes: size of a record, padding included.
        offsets: offset in bytes of every component: "gate.weight", "gate.scales", "gate.biases", "up.weight", ...
    """

    hidden_size: int
    intermediate_size: int
    bits: int
    group_size: int
    dtype: mx.Dtype
    record_bytes: int
    offsets: Mapping[str, int]

    def expert(self, record: mx.array) -> ExpertWeights:
        """Return the matrices of ``record``, uint8 [record_bytes], as views."""
        return ExpertWeights(*(self._weight(record, projection) for projection in PROJECTIONS))

    def shape(self, projection: str) -> tuple[int, int]:
        """Return rows and columns of ``projection``: "gate", "up" or "down"."""
        if projection == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    def resized(self, hidden_size: int, intermediate_size: int) -> "ExpertFormat":
        """Return the same format for experts of other sizes."""
        dtype = next(name for name, dtype in MLX_DTYPES.items() if dtype == self.dtype)
        form = expert_format(RecordLayout(hidden_size, intermediate_size, self.bits, self.group_size, dtype))
        assert form is not None
        return form

    def _weight(self, record: mx.array, projection: str) -> QuantizedWeight:
        rows, columns = self.shape(projection)
        shapes = {"weight": (rows, columns * self.bits // 32), "scales": (rows, columns // self.group_size)}
        shapes["biases"] = shapes["scales"]

        def part(name: str) -> mx.array:
            dtype = mx.uint32 if name == "weight" else self.dtype
            offset, shape = self.offsets[f"{projection}.{name}"], shapes[name]
            return record[offset : offset + shape[0] * shape[1] * dtype.size].view(dtype).reshape(shape)

        return QuantizedWeight(part("weight"), part("scales"), part("biases"), self.bits, self.group_size)


@cache
def expert_format(layout: RecordLayout) -> ExpertFormat | None:
    """Return the format of the records of ``layout``; None if they are dense."""
    if layout.bits is None or layout.group_size is None:
        return None
    return ExpertFormat(
        layout.hidden_size,
        layout.intermediate_size,
        layout.bits,
        layout.group_size,
        MLX_DTYPES[layout.dtype],
        layout.record_bytes,
        {component.name: component.offset for component in layout.components},
    )
