"""The places in files of tensors that a model rearranges when it is loaded.

MLX-LM's models rename, stack, split and transpose published tensors with MLX's operations. MLX can list the operations
of a function without computing them; here they are applied to places in files, so that single experts can be read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.formats.safetensors_header import TensorInfo

Piece = tuple[TensorInfo, int, int]
"""A part of a tensor: (tensor, first byte, number of bytes)."""
_MOST_PIECES = 4096
"""The largest number of pieces of one tensor of one expert; to read more would take longer than to make a pack."""
_ORIGIN = np.zeros(1, np.uint8)
_START: int = _ORIGIN.__array_interface__["data"][0]


class UntraceableError(Exception):
    """A tensor that is not a rearrangement of parts of files; the message says why."""


@dataclass(frozen=True)
class Region:
    """Elements of one tensor in a file.

    Attributes:
        tensor: the tensor.
        elements: a view whose addresses, relative to ``_ORIGIN``, are places in the tensor. Its memory does not exist:
            it may be sliced, transposed and reshaped, and never copied.
    """

    tensor: TensorInfo
    elements: npt.NDArray[Any]

    @classmethod
    def whole(cls, tensor: TensorInfo) -> "Region":
        """Return all elements of ``tensor``."""
        width = tensor.nbytes // (prod(tensor.shape) or 1)
        return cls(tensor, np.asarray(_Memory(tensor.shape, width or 1)))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the elements."""
        return self.elements.shape

    def on(self, view: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> "Region":
        """Return the elements that ``view`` selects, which must not copy."""
        return Region(self.tensor, view(self.elements))

    def pieces(self) -> list[Piece]:
        """Return the places of the elements in row-major order."""
        array = self.elements
        if not array.size:
            return []
        if array.flags.c_contiguous:
            start = array.__array_interface__["data"][0] - _START
            return [(self.tensor, start, array.nbytes)]
        if array.ndim == 1 or len(array) > _MOST_PIECES:
            raise UntraceableError("its elements lie apart in the file")
        return joined([piece for row in array for piece in Region(self.tensor, row).pieces()])


class _Memory:
    """Memory of a shape that does not exist, at ``_ORIGIN``."""

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        data, typestr = (_START, False), f"|V{width}"
        self.__array_interface__ = {"data": data, "shape": shape, "strides": None, "typestr": typestr, "version": 3}


@dataclass(frozen=True)
class Joined:
    """Tensors one after the other along ``axis``."""

    axis: int
    parts: Sequence["Node"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)


Node = Region | Joined


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Return ``pieces`` with neighbors in one file joined.

    Raises:
        UntraceableError: there are too many.
    """
    found: list[Piece] = []
    for tensor, start, nbytes in pieces:
        if found and found[-1][0] is tensor and found[-1][1] + found[-1][2] == start:
            found[-1] = (tensor, found[-1][1], found[-1][2] + nbytes)
        else:
            found.append((tensor, start, nbytes))
    if len(found) > _MOST_PIECES:
        raise UntraceableError(f"an expert lies in {len(found)} pieces")
    return found


def row(node: Node, index: int) -> Node:
    """Return row ``index`` of ``node`` along its first axis."""
    if isinstance(node, Region):
        return node.on(lambda array: array[index])
    if node.axis:
        return Joined(node.axis - 1, [row(part, index) for part in node.parts])
    for part in node.parts:
        if index < part.shape[0]:
            return row(part, index)
        index -= part.shape[0]
    raise IndexError(index)


def pieces_of(node: Node) -> list[Piece]:
    """Return the places of the elements of ``node`` in row-major order.

    Raises:
        UntraceableError: they lie apart.
    """
    if isinstance(node, Region):
        return node.pieces()
    if node.axis and prod(node.shape[: node.axis]) > 1:
        rows = [piece for index in range(node.shape[0]) for piece in pieces_of(row(node, index))]
        return joined(rows)
    return joined([piece for part in node.parts for piece in pieces_of(part)])


def trace(
    function: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
    tensors: Mapping[str, tuple[TensorInfo, mx.Dtype]],
    wanted: Sequence[str],
) -> dict[str, Node | str]:
    """Return the origin of the results ``wanted`` of ``function``, or for each the reason why it has none in the files.

    Args:
        function: takes arrays by the names of ``tensors``, and returns arrays by name.
        tensors: the tensors on disk, and their types in MLX.
        wanted: names of results.
    """
    names = list(tensors)
    samples = [mx.zeros(tensors[name][0].shape, tensors[name][1]) for name in names]
    events: list[dict[str, Any]] = []

    def traced(*arrays: mx.array) -> list[mx.array]:
        made = function(dict(zip(names, arrays, strict=True)))
        return [made[name] for name in wanted]

    try:
        mx.export_function(events.append, traced, *samples)
    except Exception as error:  # MLX cannot list an operation, or the function needs values
        return dict.fromkeys(wanted, f"mlx cannot list the operations on it ({error})")
    nodes: dict[str, Node | str] = {}
    outputs: list[str] = []
    for event in events:
        if event["type"] == "inputs":
            symbols = [symbol for symbol, *_ in event["inputs"]]
            nodes |= {symbol: Region.whole(tensors[name][0]) for symbol, name in zip(symbols, names, strict=True)}
        elif event["type"] == "outputs":
            outputs = [symbol for symbol, *_ in event["outputs"]]
        elif event["type"] == "primitive":
            nodes |= _results(event, nodes)
    return {name: nodes.get(symbol, "it is computed") for name, symbol in zip(wanted, outputs, strict=True)}


def _results(event: Mapping[str, Any], nodes: Mapping[str, Node | str]) -> dict[str, Node | str]:
    """Return the results of one operation by their symbols."""
    symbols = [symbol for symbol, *_ in event["outputs"]]
    inputs: list[Node] = []
    for symbol, *_ in event["inputs"]:
        node = nodes.get(symbol, "it is computed")
        if isinstance(node, str):
            return dict.fromkeys(symbols, node)
        inputs.append(node)
    try:
        results = _apply(event, inputs)
    except (UntraceableError, ValueError) as error:
        return dict.fromkeys(symbols, f"{event['name']}: {error}")
    return dict(zip(symbols, results, strict=True))


def _apply(event: Mapping[str, Any], inputs: Sequence[Node]) -> list[Node]:
    """Apply an operation of MLX to places.

    Raises:
        UntraceableError: it is not a rearrangement.
        ValueError: it would need a copy.
    """
    name, arguments = event["name"], event["arguments"]
    node = inputs[0] if inputs else None
    if name == "Concatenate":
        return [Joined(int(arguments[0]), list(inputs))]
    if node is None:
        raise UntraceableError("it is computed")
    if name == "AsType" and event["inputs"][0][2] == event["outputs"][0][2]:
        return [node]
    if name == "Split":
        places, axis = list(arguments[0]), int(arguments[1])
        ends = [*places, node.shape[axis]]
        return [_cut(node, axis, start, end, 1) for start, end in zip([0, *places], ends, strict=True)]
    if name == "Slice":
        starts, ends, steps = arguments
        for axis, (start, end, step) in enumerate(zip(starts, ends, steps, strict=True)):
            node = _cut(node, axis, start, end, step)
        return [node]
    if name == "Transpose":
        return [_transposed(node, tuple(arguments[0]))]
    if name in ("Reshape", "ExpandDims", "Squeeze", "Flatten", "Unflatten"):
        return [_reshaped(node, tuple(event["outputs"][0][1]))]
    raise UntraceableError("it is computed")


def _cut(node: Node, axis: int, start: int, end: int, step: int) -> Node:
    if (start, end, step) == (0, node.shape[axis], 1):
        return node
    if isinstance(node, Region):
        return node.on(lambda array: array[(slice(None),) * axis + (slice(start, end, step),)])
    if node.axis != axis:
        return Joined(node.axis, [_cut(part, axis, start, end, step) for part in node.parts])
    if step != 1:
        raise UntraceableError("every other part")
    parts, first = [], 0
    for part in node.parts:
        last = first + part.shape[axis]
        if first < end and last > start:
            parts.append(_cut(part, axis, max(0, start - first), min(end, last) - first, 1))
        first = last
    return parts[0] if len(parts) == 1 else Joined(axis, parts)


def _transposed(node: Node, axes: tuple[int, ...]) -> Node:
    if isinstance(node, Region):
        return node.on(lambda array: array.transpose(axes))
    return Joined(axes.index(node.axis), [_transposed(part, axes) for part in node.parts])


def _reshaped(node: Node, shape: tuple[int, ...]) -> Node:
    if isinstance(node, Region):
        return node.on(lambda array: np.reshape(array, shape, copy=False))
    axis = _kept_axis(node.shape, node.axis, shape)
    if axis is None:
        raise UntraceableError("parts are reshaped together")
    parts = []
    for part in node.parts:
        inner = list(shape)
        inner[axis] = part.shape[node.axis]
        parts.append(_reshaped(part, tuple(inner)))
    return Joined(axis, parts)


def _kept_axis(before: tuple[int, ...], axis: int, after: tuple[int, ...]) -> int | None:
    """Return the axis of the shape ``after`` that is ``axis`` of the shape ``before``; None if there is none."""
    outer = prod(before[:axis])
    for place, size in enumerate(after):
        if size == before[axis] and prod(after[:place]) == outer and (size != 1 or place >= axis):
            return place
    return None
