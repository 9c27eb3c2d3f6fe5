"""The record: all bytes of one expert in one layer.

A record holds the projections gate, up, and down, in this order; each has a weight and, if quantized, scales and
biases. There are no gaps, and zeros pad the record to a multiple of 16 KiB. Quantized weights follow the affine scheme
of MLX: ``w = scale * code + bias`` for groups along the input dimension, with codes packed least significant bit first
in 32-bit words. At the 397B geometry the offsets therefore equal those of ``packed_experts/layer_NN.bin`` of flash-moe.
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
    """A tensor inside a record.

    Attributes:
        name: projection and part, such as "gate.scales".
        dtype: safetensors name of the element type.
        shape: [rows, columns]; of models of MLX-LM, any shape.
        offset: first byte in the record.
        nbytes: size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class RecordLayout:
    """The place of every tensor of an expert in its record, computed from the geometry.

    Args:
        hidden_size: size of the hidden state.
        intermediate_size: size of the hidden layer of an expert.
        bits: width of the quantized weights; None for weights in a float type.
        group_size: number of weights that share a scale and a bias; None if ``bits`` is None.
        dtype: "BF16", "F16", or "F32": the type of the scales and biases, or of the weights if ``bits`` is None.

    Raises:
        PackError: the combination is not supported (code "unsupported_layout").
    """

    hidden_size: int
    intermediate_size: int
    bits: int | None
    group_size: int | None
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ("BF16", "F16", "F32"):
            raise _unsupported(f"expert records of type {self.dtype} are not supported: use BF16, F16 or F32")
        if self.bits is None:
            return
        if self.bits not in QUANTIZED_BITS:
            raise _unsupported(f"{self.bits}-bit experts are not supported: use one of {_listed(QUANTIZED_BITS)}")
        if self.group_size not in GROUP_SIZES:
            raise _unsupported(f"group size {self.group_size} is not supported: use one of {_listed(GROUP_SIZES)}")
        for columns in (self.hidden_size, self.intermediate_size):
            if columns % self.group_size or columns * self.bits % 32:
                raise _unsupported(
                    f"rows of {columns} values cannot be quantized to {self.bits} bits in groups of {self.group_size}"
                )

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """The tensors of the record in the order of their bytes."""
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
        """Size of the tensors in bytes, without the padding."""
        return sum(component.nbytes for component in self.components)

    @cached_property
    def record_bytes(self) -> int:
        """Size of a record in a file and in a slot in bytes, with the padding."""
        return -(-self.payload_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT

    def to_json(self) -> dict[str, Any]:
        """Return the layout in the form of the manifest, with offsets for readers without this code."""
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


def _unsupported(message: str) -> PackError:
    return PackError(message, code="unsupported_layout")


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
