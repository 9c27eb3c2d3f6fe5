"""Where the matrices of an expert lie in its record, and what a kernel needs of an expert that is resident."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels.expert_mlp.reference import ExpertWeights, Weight

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class ExpertFormat:
    """MLX affine records: ``offsets`` in bytes, by "gate.weight", "gate.scales" and so on.

    ``dtype`` is that of scales and biases.
    """

    hidden_size: int
    intermediate_size: int
    bits: int
    group_size: int
    dtype: mx.Dtype
    record_bytes: int
    offsets: Mapping[str, int]

    def expert(self, record: mx.array) -> ExpertWeights:
        """The matrices of ``record``, uint8 [record bytes], as views."""
        return ExpertWeights(*(self._weight(record, projection) for projection in PROJECTIONS))

    def _weight(self, record: mx.array, projection: str) -> Weight:
        rows, columns = (
            (self.hidden_size, self.intermediate_size)
            if projection == "down"
            else (self.intermediate_size, self.hidden_size)
        )
        shapes = {"weight": (rows, columns * self.bits // 32), "scales": (rows, columns // self.group_size)}
        shapes["biases"] = shapes["scales"]

        def part(name: str) -> mx.array:
            dtype = mx.uint32 if name == "weight" else self.dtype
            offset, shape = self.offsets[f"{projection}.{name}"], shapes[name]
            return record[offset : offset + shape[0] * shape[1] * dtype.size].view(dtype).reshape(shape)

        return Weight(part("weight"), part("scales"), part("biases"), self.bits, self.group_size)
