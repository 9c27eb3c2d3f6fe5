"""Records of experts of any module: the tensors of its linear layers under their names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx

from flashmoe_mlx.errors import PackError
from flashmoe_mlx.formats.arrays import MLX_DTYPES
from flashmoe_mlx.formats.fields import LARGEST_SIZE, shown
from flashmoe_mlx.formats.record import AFFINE, Component, MatrixFormat, RecordLayout

_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items()}

_MOST_COMPONENTS = 64
_MOST_DIMENSIONS = 8


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
    def is_native(self) -> bool:
        """False: only copies of these records can be made."""
        return False

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


def read_layout(entry: Any, hidden_size: int, expert_size: int) -> NamedLayout:
    """Read the entry of a layout in the manifest of a pack, which is untrusted.

    Args:
        entry: the entry, as ``RecordLayout.to_json`` makes it.
        hidden_size: the size of the hidden state.
        expert_size: the size of the hidden layer of an expert.

    Raises:
        PackError: it is malformed (code "invalid_manifest").
    """
    listed = entry.get("components") if isinstance(entry, dict) else None
    if not isinstance(listed, list) or not 0 < len(listed) <= _MOST_COMPONENTS:
        raise PackError("a layout has no list of components", code="invalid_manifest")
    tensors = []
    for component in listed:
        stated = component if isinstance(component, dict) else {}
        name, dtype, shape = (stated.get(key) for key in ("name", "dtype", "shape"))
        sizes = shape if isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS else [0]
        if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in MLX_DTYPES:
            raise PackError(f"component {shown(name)} has an unknown name or type", code="invalid_manifest")
        if not all(type(size) is int and 0 < size <= LARGEST_SIZE for size in sizes):
            raise PackError(f"component {shown(name)} has the shape {shown(shape)}", code="invalid_manifest")
        tensors.append((name, tuple(sizes), MLX_DTYPES[dtype]))
    bits, group_size, dtype, mode = (entry.get(key) for key in ("bits", "group_size", "dtype", "mode"))
    whole = all(value is None or type(value) is int for value in (bits, group_size))
    if not whole or not isinstance(dtype, str) or not isinstance(mode, str | None) or dtype not in MLX_DTYPES:
        raise PackError("a layout lacks bits, group_size or dtype", code="invalid_manifest")
    form = AnyFormat(bits, group_size, dtype, mode or AFFINE)
    return NamedLayout(hidden_size, expert_size, form, form, form, components_of(tensors))


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
