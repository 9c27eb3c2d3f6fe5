"""Resident tensors of a checkpoint in the form that the model uses."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from flashmoe_mlx.formats.record import AFFINE
from flashmoe_mlx.formats.safetensors_header import TensorInfo


@dataclass(frozen=True, slots=True)
class ResidentTensor:
    """A tensor in the form that the model uses.

    Attributes:
        name: its name.
        shape: its shape.
        source: the published tensor.
        add_one: whether 1 is added to each value.
        rows: the first row and the number of rows of each part of ``source`` that the tensor consists of; None for the
            whole.
    """

    name: str
    shape: tuple[int, ...]
    source: TensorInfo
    add_one: bool = False
    rows: tuple[tuple[int, int], ...] | None = None

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return sum(nbytes for _, nbytes in self._parts())

    def places(self, start: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Yield the first byte and the size of each piece of ``source`` that bytes from ``start`` on consist of."""
        for first, size in self._parts():
            here = min(size - start, nbytes)
            if here > 0:
                yield first + start, here
                nbytes -= here
            start = max(0, start - size)

    def _parts(self) -> list[tuple[int, int]]:
        if self.rows is None:
            return [(0, self.source.nbytes)]
        width = self.source.nbytes // self.source.shape[0]
        return [(first * width, count * width) for first, count in self.rows]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A resident matrix: dense [out, in], or quantized if it has ``scales`` and, in MLX's affine mode, ``biases``.

    ``shape`` is the dense one; ``least_bits`` is the smallest width to which the matrix may be quantized.
    """

    name: str
    shape: tuple[int, ...]
    least_bits: int
    weight: ResidentTensor
    scales: ResidentTensor | None = None
    biases: ResidentTensor | None = None
    mode: str = field(default=AFFINE, kw_only=True)

    @property
    def parts(self) -> tuple[ResidentTensor, ...]:
        """The stored tensors."""
        return tuple(part for part in (self.weight, self.scales, self.biases) if part is not None)
