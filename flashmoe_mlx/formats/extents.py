"""Byte ranges of files: the location of experts, and reads that return all requested bytes or fail."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.formats.record import LayerLayouts

__all__ = ["ExpertSource", "Experts", "Extent", "RecordSource", "read_exactly", "read_extents"]


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes at ``offset`` of the file at ``path``."""

    path: Path
    offset: int
    nbytes: int


class Experts(Protocol):
    """The experts of a model, in records."""

    @property
    def layout(self) -> LayerLayouts:
        """The layout of the records of each layer."""
        ...

    @property
    def num_layers(self) -> int:
        """The number of layers with experts."""
        ...

    @property
    def num_experts(self) -> int:
        """The number of experts in each layer."""
        ...


class ExpertSource(Experts, Protocol):
    """The location of the bytes of every expert: in a variant of a pack, or in a published checkpoint."""

    def extents(self, layer: int, expert: int) -> Sequence[Extent]:
        """Return the byte ranges of an expert in the order of its record: one in a pack, several in a checkpoint."""
        ...


class RecordSource(Experts, Protocol):
    """The records of experts, read, decoded or computed, for new variants."""

    def payload(self, layer: int, expert: int) -> bytearray:
        """Read the components of an expert in the order of its record."""
        ...

    def exact(self, layer: int, expert: int) -> Mapping[str, npt.NDArray[np.float32]]:
        """Return the weights [out, in], without rounding, of the projections that ``payload`` decodes."""
        ...


def read_exactly(fd: int, view: memoryview, offset: int) -> int:
    """Fill ``view`` from ``offset`` of the file ``fd``, in as many reads as it takes; return the number of reads.

    ``view`` is writable and of format "B".

    Raises:
        EOFError: the file ends inside the range; ``args[0]`` is the first byte that is missing.
        OSError: the system reported an error.
    """
    done = reads = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise EOFError(offset + done)
        done += count
        reads += 1
    return reads


def read_extents(extents: Sequence[Extent]) -> bytearray:
    """Read ``extents`` and return their bytes, joined in the given order.

    Raises:
        InputError: a file ends inside its extent.
        FlashMoeError: a file cannot be read.
    """
    data = bytearray(sum(extent.nbytes for extent in extents))
    done = 0
    for extent in extents:
        try:
            fd = os.open(extent.path, os.O_RDONLY)
            try:
                read_exactly(fd, memoryview(data)[done : done + extent.nbytes], extent.offset)
            finally:
                os.close(fd)
        except EOFError as error:
            raise InputError(f"{extent.path}: ends at byte {error.args[0]}: it was truncated while in use") from None
        except OSError as error:
            raise FlashMoeError(f"{extent.path}: cannot be read at byte {extent.offset} ({error.strerror})") from error
        done += extent.nbytes
    return data
