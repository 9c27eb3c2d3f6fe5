"""Resident tensors of a model: names, shapes, and the form in which published checkpoints store them.

Names are those of mlx-community checkpoints without their ``language_model.`` prefix. Routed experts stay in storage
and are no parameters here.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count, takewhile

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.record import GROUP_SIZES, QUANTIZED_BITS

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head"
"""Names that all families share; a model with tied embeddings has no head."""

ROUTER_BITS = 8
"""Least width of matrices that choose experts, as in mlx_lm: a wrong choice costs more than their few bytes."""

Draw = Callable[[np.random.Generator, tuple[int, ...]], npt.NDArray[np.floating]]
"""Draws an array of a shape from a generator."""


class Kind(Enum):
    """The form in which a parameter is stored."""

    MATRIX = auto()
    """``name.weight`` [out, in], dense or quantized with ``name.scales`` and ``name.biases``."""
    NORM = auto()
    """The factor of an RMS norm, from which Hugging Face checkpoints subtract 1."""
    OFFSET_NORM = auto()
    """The factor of an RMS norm, from which all checkpoints subtract 1."""
    CONV = auto()
    """Depthwise convolution [channels, kernel, 1]; Hugging Face has [channels, 1, kernel], the same bytes."""
    PLAIN = auto()
    """A vector that every layout stores unchanged, for example the factor of an RMS norm or a bias."""
    EXACT = auto()
    """A plain vector that the model needs in float32, for example the exponent of an exponential."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a larger matrix in published checkpoints.

    Attributes:
        matrix: the name of the larger matrix, without ``.weight``.
        height: the number of its rows.
        ranges: the first row and the number of rows of each part, in the order in which the model uses them.
    """

    matrix: str
    height: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A resident tensor.

    Attributes:
        name: its name; without ``.weight`` if the kind is MATRIX.
        kind: the form in which it is stored.
        shape: its shape, dense.
        least_bits: the smallest width to which a matrix may be quantized.
        gain: the factor by which the entries of a random matrix exceed 1 / sqrt(in), for synthetic models.
        draw: draws a random vector for synthetic models; None for a vector of ones.
        published: the rows of a larger matrix that checkpoints have in place of this one; None if they have this one.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    least_bits: int = 0
    gain: float = 1.0
    draw: Draw | None = None
    published: Rows | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table that stays in storage, because a token needs only a few of its rows.

    Attributes:
        name: its name, without ``.weight``. Checkpoints may divide its rows among ``name.shard_0``, ``name.shard_1``...
        rows: the number of rows; checkpoints may have further rows.
        columns: the width of a row.
    """

    name: str
    rows: int
    columns: int


def part_names(table: Table, names: Collection[str]) -> list[str]:
    """Return the names, without ``.weight``, of the parts of ``table`` among the names of all tensors, in order."""
    if f"{table.name}.weight" in names:
        return [table.name]
    numbers = takewhile(lambda number: f"{table.name}.shard_{number}.weight" in names, count())
    return [f"{table.name}.shard_{number}" for number in numbers]


def quantization_of(
    name: str, dense: tuple[int, ...], weight: tuple[int, ...], scales: tuple[int, ...]
) -> tuple[int, int]:
    """Return (bits, group size) of a matrix in affine quantization, from its shapes alone.

    Conversions differ in the matrices that they keep at 8 bits, and the config of an old conversion does not list them;
    the shapes are always conclusive.

    Args:
        name: the name of the matrix in messages.
        dense: its shape [..., out, in] before quantization.
        weight: the shape of its packed codes.
        scales: the shape of its scales.

    Raises:
        InputError: the shapes fit no supported quantization of the matrix.
    """
    columns = dense[-1]
    for bits in QUANTIZED_BITS:
        for group_size in GROUP_SIZES:
            packed = (*dense[:-1], columns * bits // 32)
            groups = (*dense[:-1], columns // group_size)
            if columns % group_size == 0 and columns * bits % 32 == 0 and (weight, scales) == (packed, groups):
                return bits, group_size
    raise InputError(
        f"{name}: weight {list(weight)} with scales {list(scales)} is not a supported quantization of {list(dense)}"
    )
