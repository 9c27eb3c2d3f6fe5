"""Measure how much of a file is in the page cache, and drop files from it: cold measurements need both."""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from flashmoe_mlx.errors import FlashMoeError


def cached_bytes(path: Path) -> int:
    """Return how many bytes of the file at ``path`` are in the page cache, in whole pages, by mincore(2).

    Raises:
        FlashMoeError: the system refuses to tell; code "unknown_page_cache".
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        return sum(_cached(path, file.fileno(), at, min(_WINDOW, size - at)) for at in range(0, size, _WINDOW))


def _cached(path: Path, fd: int, offset: int, size: int) -> int:
    with mmap.mmap(fd, size, access=mmap.ACCESS_COPY, offset=offset) as mapped:
        resident = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), resident):
            raise FlashMoeError(
                f"{path}: cannot tell what is in the page cache ({os.strerror(ctypes.get_errno())})",
                code="unknown_page_cache",
            )
    return mmap.PAGESIZE * sum(bytes(resident).translate(_LOWEST_BIT))


_WINDOW = 2**30
"""Bytes of a file that are mapped at a time: the system refuses a private mapping larger than memory."""
_LOWEST_BIT = bytes(value & 1 for value in range(256))


def evict(paths: Iterable[Path]) -> None:
    """Drop whole files from the page cache and check that they are gone.

    Parts of files cannot be dropped reliably: the kernel keeps a page that shares a block of memory with a page that
    stays.

    Raises:
        FlashMoeError: this system cannot drop files (code "unsupported_system"), or some pages stay ("still_cached").
    """
    if sys.platform != "linux":
        raise FlashMoeError(
            "files can be dropped from the page cache on Linux alone; conditions=[warm] works here",
            code="unsupported_system",
        )
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if cached_bytes(path):
                os.fsync(fd)  # dirty pages cannot be dropped
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        if left := cached_bytes(path):
            raise FlashMoeError(
                f"{path}: {left / 1e6:.1f} MB stay in the page cache (a filesystem in memory, or mapped by another "
                "process): nothing is cold here; conditions=[warm] works",
                code="still_cached",
            )
