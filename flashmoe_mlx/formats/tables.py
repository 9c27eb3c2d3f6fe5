"""Tables in files, of which a program needs a few rows at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

from flashmoe_mlx.formats.extents import Extent


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        extent: its bytes.
        dtype: the safetensors name of its element type.
        shape: its shape.
    """

    extent: Extent
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """The size of a row in bytes."""
        return self.extent.nbytes // self.shape[0]


@dataclass(frozen=True, slots=True)
class TablePart:
    """Consecutive rows of a table: a dense matrix, or codes, scales and biases in MLX's affine format.

    Attributes:
        tensors: the dense matrix alone, or codes, scales and biases, each with a row for every row of the part.
        bits: the width of a code; None for a dense matrix.
        group_size: the codes that share a scale and a bias; None for a dense matrix.
    """

    tensors: Sequence[StoredTensor]
    bits: int | None = None
    group_size: int | None = None

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.tensors[0].shape[0]

    @property
    def row_format(self) -> tuple[object, ...]:
        """The format of a row; parts of one table have equal formats."""
        return self.bits, self.group_size, *((tensor.dtype, tensor.shape[1:]) for tensor in self.tensors)
