"""Records of experts of any module: the tensors of its linear layers under their names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import mlx.core as mx

from flashmoe_mlx.formats.arrays import MLX_DTYPES
from flashmoe_mlx.formats.record import RECORD_ALIGNMENT, Component, RecordLayout

_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items()}


@dataclass(frozen=True)
class NamedLayout(RecordLayout):
    """The place of every tensor of an expert, layer by layer.

    All records have the size of the largest one. ``bits``, ``group_size`` and ``dtype`` are those of the first matrix.

    Attributes:
        layers: the tensors of a record of each layer, named by projection and part, such as "fc1.weight".
    """

    layers: tuple[tuple[Component, ...], ...] = ()

    def __post_init__(self) -> None:
        """Accept any tensors: MLX computes with them."""

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """The tensors of a record of the first layer."""
        return self.layers[0]

    @cached_property
    def payload_bytes(self) -> int:
        """Size of the tensors of the largest record in bytes."""
        return max(sum(component.nbytes for component in layer) for layer in self.layers)

    @cached_property
    def record_bytes(self) -> int:
        """Size of a record in a file and in a slot in bytes, with the padding."""
        return -(-self.payload_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT


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


def to_json(layout: NamedLayout) -> dict[str, Any]:
    """Return ``layout`` in the form of the manifest of a pack."""
    return {
        "bits": layout.bits,
        "group_size": layout.group_size,
        "dtype": layout.dtype,
        "record_bytes": layout.record_bytes,
        "layers": [
            [
                {"name": c.name, "dtype": c.dtype, "shape": list(c.shape), "offset": c.offset, "bytes": c.nbytes}
                for c in layer
            ]
            for layer in layout.layers
        ],
    }
