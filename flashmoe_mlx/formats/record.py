"""The record: all bytes of one expert in one layer.

Order: gate, up, down; of each its weight and, if quantised, its scales and biases. No gaps, zero padding at the end up
to 16 KiB. Quantised weights are MLX affine (``w = scale * code + bias`` for groups along the input dimension; codes are
packed least significant bit first in 32-bit words), so at the 397B geometry the offsets equal those of flash-moe's
``packed_experts/layer_NN.bin``. Offsets are computed from the geometry, never tabulated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flashmoe_mlx.errors import PackError

RECORD_ALIGNMENT = 16 * 1024
PROJECTIONS = ("gate", "up", "down")
QUANTIZED_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
DTYPE_BYTES: Mapping[str, int] = {"U32": 4, "BF16": 2, "F16": 2, "F32": 4}
"""Sizes of the element types that a record may hold, under their safetensors names."""


@dataclass(frozen=True)
class Component:
    """One tensor inside a record; ``offset`` and ``nbytes`` in bytes, ``shape`` as [rows, columns]."""

    name: str
    dtype: str
    shape: tuple[int, int]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class RecordLayout:
    """Where every tensor of an expert lies in its record.

    ``bits`` is the width of the quantised weights, or None for weights kept as published. ``dtype`` is that of the
    scales and biases, or of the weights themselves when ``bits`` is None: "BF16", "F16" or "F32".
    """

    hidden_size: int
    intermediate_size: int
    bits: int | None
    group_size: int | None
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ("BF16", "F16", "F32"):
            raise PackError(f"expert records of type {self.dtype} are not supported: use BF16, F16 or F32")
        if self.bits is None:
            return
        if self.bits not in QUANTIZED_BITS:
            raise PackError(f"{self.bits}-bit experts are not supported: use one of {_listed(QUANTIZED_BITS)}")
        if self.group_size not in GROUP_SIZES:
            raise PackError(f"group size {self.group_size} is not supported: use one of {_listed(GROUP_SIZES)}")
        for columns in (self.hidden_size, self.intermediate_size):
            if columns % self.group_size or columns * self.bits % 32:
                raise PackError(
                    f"rows of {columns} values cannot be quantised to {self.bits} bits in groups of {self.group_size}"
                )

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """Every tensor of the record, in the order of its bytes."""
        found: list[Component] = []
        offset = 0
        for projection in PROJECTIONS:
            for part, dtype, shape in self._tensors(projection):
                nbytes = DTYPE_BYTES[dtype] * shape[0] * shape[1]
                found.append(Component(f"{projection}.{part}", dtype, shape, offset, nbytes))
                offset += nbytes
        return tuple(found)

    def _tensors(self, projection: str) -> list[tuple[str, str, tuple[int, int]]]:
        rows, columns = self.projection_shape(projection)
        if self.bits is None:
            return [("weight", self.dtype, (rows, columns))]
        assert self.group_size is not None
        groups = (rows, columns // self.group_size)
        return [
            ("weight", "U32", (rows, columns * self.bits // 32)),
            ("scales", self.dtype, groups),
            ("biases", self.dtype, groups),
        ]

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """Return the [output, input] size of the dense ``projection``: "gate", "up" or "down"."""
        if projection == "down":
            return (self.hidden_size, self.intermediate_size)
        return (self.intermediate_size, self.hidden_size)

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of the tensors, without the padding."""
        return sum(component.nbytes for component in self.components)

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of a record in a file and in a slot, with the padding."""
        return -(-self.payload_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT

    def to_json(self) -> dict[str, Any]:
        """Return the layout in the form of the manifest; offsets are for readers without this code."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "dtype": self.dtype,
            "record_bytes": self.record_bytes,
            "components": [
                {"name": c.name, "dtype": c.dtype, "shape": list(c.shape), "offset": c.offset, "bytes": c.nbytes}
                for c in self.components
            ],
        }


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
