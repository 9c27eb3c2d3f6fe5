"""A store of the rows of a table, which it reads from files when they are needed."""

import fcntl
import os
import struct
import sys
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.formats.arrays import array_from
from flashmoe_mlx.formats.extents import read_exactly
from flashmoe_mlx.formats.tables import StoredTensor, TablePart
from flashmoe_mlx.stores.reads import FileDescriptorCache, open_for_reading

_F_RDADVISE = 44
"""The command of macOS that begins to read a range into the page cache."""


class RowStore:
    """Reads rows of a table through the page cache.

    A row has a few hundred bytes, and the rows that a token needs are spread over the whole table. The store therefore
    tells the system about all rows before it reads the first, so that storage serves them at the same time.

    Args:
        parts: the parts of the table in order; all have one ``row_format``.
    """

    def __init__(self, parts: Sequence[TablePart]) -> None:
        self._parts = parts
        self._ends = np.cumsum([part.rows for part in parts])
        self._files = FileDescriptorCache(open_for_reading)
        self.rows_read: int = 0
        """The number of rows that were read."""
        self.bytes_read: int = 0
        """The bytes of these rows."""

    @property
    def rows(self) -> int:
        """The number of rows."""
        return int(self._ends[-1])

    def fetch(self, rows: npt.NDArray[np.int64], dtype: mx.Dtype) -> mx.array:
        """Return the rows with the indices ``rows`` [n], as an array [n, columns] of type ``dtype``.

        Raises:
            FlashMoeError: a row cannot be read; code "unreadable_row".
        """
        distinct, places = np.unique(rows, return_inverse=True)
        owners = np.searchsorted(self._ends, distinct, side="right")
        own = distinct - np.concatenate([[0], self._ends[:-1]])[owners]
        wanted = list(zip(owners.tolist(), own.tolist(), strict=True))
        for tensor, row in self._places(wanted):
            _hint(self._open(tensor), tensor.extent.offset + row * tensor.row_bytes, tensor.row_bytes)
        first = self._parts[0]
        arrays = [self._read(wanted, index) for index in range(len(first.tensors))]
        self.rows_read += len(wanted)
        indices = mx.array(places.reshape(-1).astype(np.uint32))
        if first.bits is None:
            return arrays[0][indices].astype(dtype)
        weight, *rest = (array[indices] for array in arrays)
        scales, biases = (part.astype(mx.float32) for part in rest)
        return mx.dequantize(weight, scales, biases, group_size=first.group_size, bits=first.bits).astype(dtype)

    def _places(self, wanted: Sequence[tuple[int, int]]) -> Iterator[tuple[StoredTensor, int]]:
        for part, row in wanted:
            for tensor in self._parts[part].tensors:
                yield tensor, row

    def _read(self, wanted: Sequence[tuple[int, int]], index: int) -> mx.array:
        """Read rows of the tensor ``index`` of their parts, pairs of a part and a row in it."""
        like = self._parts[0].tensors[index]
        size = like.row_bytes
        data = memoryview(bytearray(len(wanted) * size))
        for number, (part, row) in enumerate(wanted):
            tensor = self._parts[part].tensors[index]
            offset = tensor.extent.offset + row * size
            try:
                read_exactly(self._open(tensor), data[number * size : (number + 1) * size], offset)
            except EOFError:
                raise _unreadable(tensor, offset, "the file ends before") from None
            except OSError as error:
                raise _unreadable(tensor, offset, str(error.strerror)) from error
        self.bytes_read += len(data)
        return array_from(data, like.dtype, (len(wanted), *like.shape[1:]))

    def _open(self, tensor: StoredTensor) -> int:
        try:
            return self._files[tensor.extent.path]
        except OSError as error:
            raise _unreadable(tensor, tensor.extent.offset, str(error.strerror)) from error


def _unreadable(tensor: StoredTensor, offset: int, reason: str) -> FlashMoeError:
    return FlashMoeError(
        f"{tensor.extent.path}: a row of a table at byte {offset} cannot be read ({reason}); check the file with "
        "task=pack verify=true, and the storage",
        code="unreadable_row",
    )


def _hint(fd: int, offset: int, nbytes: int) -> None:
    """Let the system begin to read ``nbytes`` bytes at ``offset``."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, _F_RDADVISE, struct.pack("@qi4x", offset, nbytes))
    else:
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)
