"""Arrays in memory that nobody has written to.

MLX has no function that allocates without filling. Filling 50 MB, the result of one product of a prompt, takes 34 ms on
one thread, most of it page faults; a kernel that writes the result takes them on all threads. ``mx.load`` allocates an
array and lets a file write the data, and the file of this module writes none.
"""

import struct
from typing import BinaryIO, cast

import mlx.core as mx

_MAGIC = b"\x93NUMPY\x01\x00"


class _Unwritten:
    """A file in NumPy's format whose header can be read, and whose data remain what they were in memory."""

    closed = False

    def __init__(self, header: bytes) -> None:
        self._header = header
        self._at = 0

    def readinto(self, to: memoryview) -> int:
        """Read the header as far as it reaches; leave the rest of ``to`` as it is."""
        part = self._header[self._at : self._at + len(to)]
        to[: len(part)] = part
        self._at += len(to)
        return len(to)

    def read(self, count: int) -> bytes:
        """Read from the header."""
        part = self._header[self._at : self._at + count]
        self._at += count
        return part

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to ``offset``, from the beginning (0) or from the current position (1)."""
        self._at = offset if whence == 0 else self._at + offset
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True


def untouched(shape: tuple[int, ...]) -> mx.array:
    """Return an evaluated array in f32 with arbitrary values; every value must be written before it is read."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(_MAGIC) + 2 + len(text) + 1) % 64) + b"\n"
    file = cast("BinaryIO", _Unwritten(_MAGIC + struct.pack("<H", len(text)) + text))  # in the methods that MLX calls
    array = mx.load(file, format="npy")
    assert isinstance(array, mx.array)
    mx.eval(array)
    return array
