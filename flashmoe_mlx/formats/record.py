"""The record: all bytes of one expert in one layer.

A record holds the projections gate, up, and down, in this order; each has a weight and, if quantized, scales and
biases. There are no gaps, and zeros pad the record to a multiple of 16 KiB. Quantized weights follow the affine scheme
of MLX: ``w = scale * code + bias`` for groups along the input dimension, with codes packed least significant bit first
in 32-bit words. At the 397B geometry the offsets therefore equal those of ``packed_experts/layer_NN.bin`` of flash-moe.

Each projection has a format, and each layer a layout, so both may have different widths. All records of one layer have
the same size.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from flashmoe_mlx.errors import PackError

__all__ = [
    "AFFINE",
    "DTYPE_BYTES",
    "FLOAT_MODES",
    "GROUP_SIZES",
    "PROJECTIONS",
    "QUANTIZED_BITS",
    "RECORD_ALIGNMENT",
    "Component",
    "LayerLayouts",
    "MatrixFormat",
    "RecordLayout",
]

RECORD_ALIGNMENT = 16 * 1024
PROJECTIONS = ("gate", "up", "down")
QUANTIZED_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
DTYPE_BYTES: Mapping[str, int] = {"U8": 1, "U32": 4, "BF16": 2, "F16": 2, "F32": 4}
"""Sizes of the element types that a record may hold, under their safetensors names."""
AFFINE = "affine"
FLOAT_MODES: Mapping[str, tuple[int, int]] = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
"""Bits and group size of MLX's modes whose codes are small floats, with scales of one byte and without biases."""


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
class MatrixFormat:
    """The format of the matrix of one projection.

    Args:
        bits: width of the quantized weights; None for weights in a float type.
        group_size: number of weights that share a scale and a bias; None if ``bits`` is None.
        dtype: "BF16", "F16", or "F32": the type of the scales and biases, or of the weights if ``bits`` is None; "U8"
            for the scales of ``FLOAT_MODES``.
        mode: MLX's mode of quantization, ``AFFINE`` or a key of ``FLOAT_MODES``.

    Raises:
        PackError: the combination is not supported (code "unsupported_layout").
    """

    bits: int | None
    group_size: int | None
    dtype: str
    mode: str = AFFINE

    def __post_init__(self) -> None:
        if self.mode in FLOAT_MODES:
            if (self.bits, self.group_size, self.dtype) != (*FLOAT_MODES[self.mode], "U8"):
                raise _unsupported(f"{self.mode} has {FLOAT_MODES[self.mode]} bits and weights in a group")
            return
        if self.mode != AFFINE:
            raise _unsupported(f"mode {self.mode!r} is not supported: use {AFFINE}, {', '.join(FLOAT_MODES)}")
        if self.dtype not in ("BF16", "F16", "F32"):
            raise _unsupported(f"expert records of type {self.dtype} are not supported: use BF16, F16 or F32")
        if self.bits is None:
            return
        if self.bits not in QUANTIZED_BITS:
            raise _unsupported(f"{self.bits}-bit experts are not supported: use one of {_listed(QUANTIZED_BITS)}")
        if self.group_size not in GROUP_SIZES:
            raise _unsupported(f"group size {self.group_size} is not supported: use one of {_listed(GROUP_SIZES)}")

    @property
    def name(self) -> str:
        """The format in words."""
        if self.mode != AFFINE:
            return self.mode
        if self.bits is None:
            return f"dense weights in {self.dtype}"
        return f"{self.bits} bits in groups of {self.group_size} with scales in {self.dtype}"

    def tensors(self, rows: int, columns: int) -> list[tuple[str, str, tuple[int, int]]]:
        """Return the parts of a matrix [rows, columns] in their order: name, safetensors type and shape.

        Raises:
            PackError: rows of this length cannot have this format (code "unsupported_layout").
        """
        if self.bits is None:
            return [("weight", self.dtype, (rows, columns))]
        assert self.group_size is not None
        if columns % self.group_size or columns * self.bits % 32:
            raise _unsupported(
                f"rows of {columns} values cannot be quantized to {self.bits} bits in groups of {self.group_size}"
            )
        groups = (rows, columns // self.group_size)
        parts = [("weight", "U32", (rows, columns * self.bits // 32)), ("scales", self.dtype, groups)]
        return parts if self.mode != AFFINE else [*parts, ("biases", self.dtype, groups)]

    def to_json(self) -> dict[str, Any]:
        """Return the format in the form of the manifest."""
        stated = {"bits": self.bits, "group_size": self.group_size, "dtype": self.dtype}
        return stated if self.mode == AFFINE else {**stated, "mode": self.mode}


@dataclass(frozen=True)
class RecordLayout:
    """The place of every tensor of an expert in its record, computed from the geometry and the formats.

    Args:
        hidden_size: size of the hidden state.
        intermediate_size: size of the hidden layer of an expert.
        gate: format of the projection gate.
        up: format of the projection up.
        down: format of the projection down.

    Raises:
        PackError: a projection cannot have its format (code "unsupported_layout").
    """

    hidden_size: int
    intermediate_size: int
    gate: MatrixFormat
    up: MatrixFormat
    down: MatrixFormat

    def __post_init__(self) -> None:
        _ = self.components  # refuses sizes that do not fit

    @classmethod
    def uniform(
        cls, hidden_size: int, intermediate_size: int, bits: int | None, group_size: int | None, dtype: str
    ) -> Self:
        """Return the layout with one format for all projections.

        Args:
            hidden_size: size of the hidden state.
            intermediate_size: size of the hidden layer of an expert.
            bits: as in ``MatrixFormat``.
            group_size: as in ``MatrixFormat``.
            dtype: as in ``MatrixFormat``.
        """
        return cls(hidden_size, intermediate_size, *[MatrixFormat(bits, group_size, dtype)] * 3)

    @property
    def formats(self) -> tuple[MatrixFormat, MatrixFormat, MatrixFormat]:
        """The formats in the order of ``PROJECTIONS``."""
        return self.gate, self.up, self.down

    def format_of(self, projection: str) -> MatrixFormat:
        """Return the format of ``projection``: "gate", "up" or "down"."""
        return self.formats[PROJECTIONS.index(projection)]

    @property
    def is_native(self) -> bool:
        """Whether the formats describe all tensors, so that records can be converted."""
        return True

    @property
    def single_format(self) -> MatrixFormat | None:
        """The format of all projections; None if they differ."""
        return self.gate if self.gate == self.up == self.down else None

    @property
    def name(self) -> str:
        """The formats in words."""
        if self.single_format is not None:
            return self.single_format.name
        return ", ".join(f"{projection} {self.format_of(projection).name}" for projection in PROJECTIONS)

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """The tensors of the record in the order of their bytes."""
        found: list[Component] = []
        offset = 0
        for projection in PROJECTIONS:
            for part, dtype, shape in self.format_of(projection).tensors(*self.projection_shape(projection)):
                nbytes = DTYPE_BYTES[dtype] * shape[0] * shape[1]
                found.append(Component(f"{projection}.{part}", dtype, shape, offset, nbytes))
                offset += nbytes
        return tuple(found)

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
        """Size of a record in a file in bytes, with the padding."""
        return -(-self.payload_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT

    @property
    def code_bits(self) -> float:
        """Mean width of a weight in bits, without scales and biases."""
        return sum(form.bits or 8 * DTYPE_BYTES[form.dtype] for form in self.formats) / len(PROJECTIONS)

    def to_json(self) -> dict[str, Any]:
        """Return the layout in the form of the manifest, with offsets for readers without this code."""
        single = self.single_format
        formats = {name: self.format_of(name).to_json() for name in PROJECTIONS} if single is None else single.to_json()
        return {
            **formats,
            "record_bytes": self.record_bytes,
            "components": [
                {"name": c.name, "dtype": c.dtype, "shape": list(c.shape), "offset": c.offset, "bytes": c.nbytes}
                for c in self.components
            ],
        }


class LayerLayouts(tuple[RecordLayout, ...]):
    """The layout of the records of every layer."""

    @classmethod
    def uniform(cls, layout: RecordLayout, num_layers: int) -> Self:
        """Return the same layout for all layers."""
        return cls([layout] * num_layers)

    @classmethod
    def of(cls, layouts: Iterable[RecordLayout]) -> Self:
        """Return these layouts, equal ones as one object, so that comparisons are fast."""
        known: dict[RecordLayout, RecordLayout] = {}
        return cls(known.setdefault(layout, layout) for layout in layouts)

    @property
    def distinct(self) -> tuple[RecordLayout, ...]:
        """The different layouts in the order of their first layers."""
        return tuple(dict.fromkeys(self))

    @cached_property
    def record_bytes(self) -> int:
        """Size in bytes of a slot for a record of any layer: that of the largest record."""
        return max(layout.record_bytes for layout in self)

    @cached_property
    def bytes_in_all_layers(self) -> int:
        """Size in bytes of one record from each layer."""
        return sum(layout.record_bytes for layout in self)

    @property
    def mean_record_bytes(self) -> float:
        """Mean size of a record in bytes, over the layers."""
        return self.bytes_in_all_layers / len(self)

    @property
    def single_format(self) -> MatrixFormat | None:
        """The format of all projections in all layers; None if they differ."""
        return self[0].single_format if len(self.distinct) == 1 else None

    @property
    def bits(self) -> int | None:
        """The width of all quantized weights; None for dense weights and for several formats."""
        return None if self.single_format is None else self.single_format.bits

    @property
    def group_size(self) -> int | None:
        """The number of weights that share a scale and a bias; None for dense weights and for several formats."""
        return None if self.single_format is None else self.single_format.group_size

    @property
    def code_bits(self) -> float:
        """Mean width of a weight in bits, without scales and biases."""
        return sum(layout.code_bits for layout in self) / len(self)

    def to_record(self) -> dict[str, Any]:
        """Return the formats for the records of runs."""
        if self.single_format is not None:
            return self.single_format.to_json()
        layers = {layout.name: [i for i, own in enumerate(self) if own == layout] for layout in self.distinct}
        return {"bits": round(self.code_bits, 3), "layers": layers}


def _unsupported(message: str) -> PackError:
    return PackError(message, code="unsupported_layout")


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
