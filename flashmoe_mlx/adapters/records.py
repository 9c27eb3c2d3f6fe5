"""Records of experts of any module: the tensors of its linear layers under their names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from flashmoe_mlx.formats.arrays import MLX_DTYPES
from flashmoe_mlx.formats.record import Component, MatrixFormat, RecordLayout

_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items()}


class AnyFormat(MatrixFormat):
    """A format of a matrix that MLX computes with, supported by our kernels or not."""

    def __post_init__(self) -> None:
        """Accept any format."""


@dataclass(frozen=True)
class NamedLayout(RecordLayout):
    """The place of every tensor of an expert; the formats of all projections are that of its first matrix.

    Attributes:
        tensors: the tensors of a record, named by projection and part, such as "fc1.weight".
    """

    tensors: tuple[Component, ...] = ()

    def __post_init__(self) -> None:
        """Accept any tensors: MLX computes with them."""

    @property
    def components(self) -> tuple[Component, ...]:
        """The tensors of a record."""
        return self.tensors


def components_of(tensors: Iterable[tuple[str, Sequence[int], mx.Dtype]]) -> tuple[Component, ...]:
    """Return the components of a record with ``tensors``, each a name, a shape of one expert, and a type.

    Wider types come first, so that every tensor is aligned without gaps.
    """
    found: list[Component] = []
    offset = 0
    for name, shape, dtype in sorted(tensors, key=lambda tensor: -tensor[2].size):
        nbytes = dtype.size * prod(shape)
        found.append(Component(name, _NAMES[dtype], tuple(shape), offset, nbytes))
        offset += nbytes
    return tuple(found)


def slab_views(slab: mx.array, components: Iterable[Component]) -> dict[str, mx.array]:
    """Return each component of all records in ``slab``, uint8 [rows, record bytes], as a view [rows, ...], lazily."""
    views: dict[str, mx.array] = {}
    words: dict[str, mx.array] = {}
    for component in components:
        dtype = MLX_DTYPES[component.dtype]
        typed = words.setdefault(component.dtype, slab.view(dtype))
        strides = [prod(component.shape[axis + 1 :]) for axis in range(len(component.shape))]
        shape, start = (slab.shape[0], *component.shape), component.offset // dtype.size
        views[component.name] = mx.as_strided(typed, shape, [typed.shape[1], *strides], start)
    return views
