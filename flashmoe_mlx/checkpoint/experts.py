"""Routed experts of a published checkpoint as a source of records."""

from collections.abc import Sequence
from typing import Protocol

from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.coded import CodedTensor, Floats, shards_of
from flashmoe_mlx.formats.extents import Extent
from flashmoe_mlx.formats.record import LayerLayouts
from flashmoe_mlx.formats.safetensors_header import TensorInfo

Piece = tuple[TensorInfo, int, int]
"""A part of a tensor: (tensor, first byte, number of bytes)."""


class LayerExperts(Protocol):
    """The places of one layer's experts."""

    def pieces(self, expert: int) -> list[Piece]:
        """Return the components of ``expert``, in the order of its record."""
        ...

    def shards(self) -> set[str]:
        """Return the names of the shards that hold the experts."""
        ...


class CheckpointExperts:
    """The routed experts of a checkpoint, as a source of records."""

    def __init__(self, checkpoint: Checkpoint, layout: LayerLayouts, layers: Sequence[LayerExperts]) -> None:
        self.layout = layout
        self.num_layers: int = len(layers)
        self.num_experts: int = checkpoint.config.num_experts
        self._checkpoint = checkpoint
        self._layers = layers

    def extents(self, layer: int, expert: int) -> list[Extent]:
        """Locate the components of an expert, in the order of its record."""
        return [self._checkpoint.extent(*piece) for piece in self._layers[layer].pieces(expert)]

    def payload(self, layer: int, expert: int) -> bytearray:
        """Read the components of an expert, decoded where the checkpoint has codes."""
        data = bytearray()
        for piece in self._layers[layer].pieces(expert):
            data += self._checkpoint.read(*piece)
        return data

    def exact(self, layer: int, expert: int) -> dict[str, Floats]:
        """Return the weights [out, in], without rounding, of the projections that the checkpoint has as codes."""
        found = {}
        pieces = self._layers[layer].pieces(expert)
        for component, (tensor, start, nbytes) in zip(self.layout[layer].components, pieces, strict=True):
            projection, _, part = component.name.partition(".")
            if part == "weight" and isinstance(tensor, CodedTensor):
                found[projection] = tensor.exact(self._checkpoint.read, start, nbytes)
        return found

    def shards(self, layer: int) -> set[str]:
        """Return the names of the shards that hold experts of ``layer``."""
        return self._layers[layer].shards()


class StackedExperts:
    """Experts in tensors ``[experts, ...]`` with a row for each expert.

    Args:
        parts: for each component the tensor, the offset in bytes inside an expert's row, and the number of bytes;
            projections may share a tensor, one after the other.
    """

    def __init__(self, parts: Sequence[Piece]) -> None:
        self._parts = parts

    @classmethod
    def by_projection(cls, tensors: Sequence[TensorInfo]) -> "StackedExperts":
        """Return experts whose components are whole rows of ``tensors``."""
        return cls([(tensor, 0, tensor.nbytes // tensor.shape[0]) for tensor in tensors])

    def pieces(self, expert: int) -> list[Piece]:
        """Return the components of ``expert``, in the order of its record."""
        return [
            (tensor, expert * (tensor.nbytes // tensor.shape[0]) + offset, nbytes)
            for tensor, offset, nbytes in self._parts
        ]

    def shards(self) -> set[str]:
        """Return the names of the shards that hold the experts."""
        return set().union(*(shards_of(tensor) for tensor, _, _ in self._parts))


class SeparateExperts:
    """Experts with one tensor for each projection of each expert."""

    def __init__(self, tensors: Sequence[Sequence[TensorInfo]]) -> None:
        self._tensors = tensors

    def pieces(self, expert: int) -> list[Piece]:
        """Return the components of ``expert``, in the order of its record."""
        return [(tensor, 0, tensor.nbytes) for tensor in self._tensors[expert]]

    def shards(self) -> set[str]:
        """Return the names of the shards that hold the experts."""
        return set().union(*(shards_of(tensor) for tensors in self._tensors for tensor in tensors))
