"""The places of an expert's matrices in its record, and their formats."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import mlx.core as mx

from flashmoe_mlx.custom_kernels.weights import ExpertWeights, QuantizedWeight, format_name
from flashmoe_mlx.formats.arrays import MLX_DTYPES
from flashmoe_mlx.formats.record import AFFINE, PROJECTIONS, MatrixFormat, RecordLayout

__all__ = ["PROJECTIONS", "CodeFormat", "ExpertFormat", "expert_format"]


@dataclass(frozen=True)
class CodeFormat:
    """The format of a quantized matrix.

    Attributes:
        bits: width of a code.
        group_size: codes that share a scale and a bias.
        dtype: type of scales and biases.
        mode: MLX's mode of quantization; without biases unless it is affine.
    """

    bits: int
    group_size: int
    dtype: mx.Dtype
    mode: str = AFFINE

    @property
    def name(self) -> str:
        """The format in words, for the names of code paths."""
        return format_name(self.bits, self.group_size, self.dtype)

    def describes(self, weight: QuantizedWeight) -> bool:
        """Return whether ``weight`` has this format."""
        return (weight.bits, weight.group_size) == (self.bits, self.group_size) and (
            weight.scales is not None and weight.scales.dtype == self.dtype
        )


@dataclass(frozen=True)
class ExpertFormat:
    """The format of records whose matrices are quantized in modes that a kernel reads.

    Attributes:
        hidden_size: width of a token's vector.
        intermediate_size: width between the expert's matrices.
        gate: format of the matrix gate.
        up: format of the matrix up.
        down: format of the matrix down.
        record_bytes: size of a record, padding included; rows of a slab may be longer.
        offsets: offset in bytes of every component: "gate.weight", "gate.scales", "gate.biases", "up.weight", ...
    """

    hidden_size: int
    intermediate_size: int
    gate: CodeFormat
    up: CodeFormat
    down: CodeFormat
    record_bytes: int
    offsets: Mapping[str, int]

    @property
    def formats(self) -> tuple[CodeFormat, CodeFormat, CodeFormat]:
        """The formats in the order of ``PROJECTIONS``."""
        return self.gate, self.up, self.down

    @cached_property
    def name(self) -> str:
        """The formats in words, for the names of code paths."""
        if self.gate == self.up == self.down:
            return self.gate.name
        return ", ".join(f"{name} {form.name}" for name, form in zip(PROJECTIONS, self.formats, strict=True))

    def expert(self, record: mx.array) -> ExpertWeights:
        """Return the matrices of ``record``, uint8 [record_bytes], as views."""
        return ExpertWeights(*(self._weight(record, projection) for projection in PROJECTIONS))

    def format_of(self, projection: str) -> CodeFormat:
        """Return the format of ``projection``: "gate", "up" or "down"."""
        return self.formats[PROJECTIONS.index(projection)]

    def shape(self, projection: str) -> tuple[int, int]:
        """Return rows and columns of ``projection``: "gate", "up" or "down"."""
        if projection == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    def resized(self, hidden_size: int, intermediate_size: int) -> "ExpertFormat":
        """Return the same formats for experts of other sizes."""
        names = {dtype: name for name, dtype in MLX_DTYPES.items()}
        formats = (MatrixFormat(own.bits, own.group_size, names[own.dtype], own.mode) for own in self.formats)
        modes = tuple({own.mode for own in self.formats})
        form = expert_format(RecordLayout(hidden_size, intermediate_size, *formats), modes)
        assert form is not None
        return form

    def template(self) -> dict[str, int | mx.Dtype]:
        """Return the template arguments of kernels that read records: sizes, formats and offsets of all parts."""
        template: dict[str, int | mx.Dtype] = {"HIDDEN": self.hidden_size, "INTERMEDIATE": self.intermediate_size}
        for projection in PROJECTIONS:
            template |= self.template_of(projection)
        return template

    def template_of(self, projection: str) -> dict[str, int | mx.Dtype]:
        """Return the template arguments for one projection: its format, and the offsets of its parts."""
        own, prefix = self.format_of(projection), projection.upper()
        offsets = {f"{prefix}_{part.upper()}": self.offsets[f"{projection}.{part}"] for part in _PARTS}
        return {f"{prefix}_BITS": own.bits, f"{prefix}_GROUP": own.group_size, f"{prefix}_S": own.dtype, **offsets}

    def _weight(self, record: mx.array, projection: str) -> QuantizedWeight:
        rows, columns = self.shape(projection)
        own = self.format_of(projection)
        shapes = {"weight": (rows, columns * own.bits // 32), "scales": (rows, columns // own.group_size)}
        shapes["biases"] = shapes["scales"]

        def part(name: str) -> mx.array:
            dtype = mx.uint32 if name == "weight" else own.dtype
            offset, shape = self.offsets[f"{projection}.{name}"], shapes[name]
            return record[offset : offset + shape[0] * shape[1] * dtype.size].view(dtype).reshape(shape)

        biases = part("biases") if own.mode == AFFINE else None
        return QuantizedWeight(part("weight"), part("scales"), biases, own.bits, own.group_size, mode=own.mode)


_PARTS = ("weight", "scales", "biases")


@cache
def expert_format(layout: RecordLayout, modes: tuple[str, ...] = (AFFINE,)) -> ExpertFormat | None:
    """Return the format of the records of ``layout``; None if a projection is in none of MLX's ``modes``."""
    gate, up, down = (_code_format(form, modes) for form in layout.formats)
    if gate is None or up is None or down is None:
        return None
    return ExpertFormat(
        layout.hidden_size,
        layout.intermediate_size,
        gate,
        up,
        down,
        layout.record_bytes,
        {component.name: component.offset for component in layout.components},
    )


def _code_format(form: MatrixFormat, modes: tuple[str, ...]) -> CodeFormat | None:
    """Return the format of a matrix in one of ``modes``; None of any other matrix."""
    if form.bits is None or form.group_size is None or form.mode not in modes:
        return None
    return CodeFormat(form.bits, form.group_size, MLX_DTYPES[form.dtype], form.mode)
