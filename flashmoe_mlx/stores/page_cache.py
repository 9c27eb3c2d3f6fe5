"""The page cache: how much of a file it holds, and how to drop files from it. Cold measurements need both."""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.stores.libc import cachestat, load_libc

_WINDOW = 2**30
"""Bytes of a file that are mapped at a time; the system refuses a private mapping larger than the memory."""
_LOWEST_BIT = bytes(value & 1 for value in range(256))
"""Table for ``bytes.translate``: mincore(2) defines only the lowest bit of each byte."""


def cached_bytes(path: Path) -> int:
    """Return the number of bytes of the file at ``path`` in the page cache, in whole pages.

    Raises:
        OSError: the file cannot be opened.
        FlashMoeError: mincore(2) failed; code "unknown_page_cache".
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        return sum(_cached(path, file.fileno(), at, min(_WINDOW, size - at)) for at in range(0, size, _WINDOW))


def evict(paths: Iterable[Path]) -> None:
    """Drop the files at ``paths`` from the page cache and check that no page of them is left.

    Only whole files can be dropped reliably: the kernel keeps a page that shares a block of memory with a page that
    stays.

    Raises:
        FlashMoeError: this system cannot drop files (code "unsupported_system"), or some pages stay ("still_cached").
    """
    if sys.platform != "linux":
        raise FlashMoeError(
            "only Linux can drop files from the page cache; use conditions=[warm]", code="unsupported_system"
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
                f"{path}: {left / 1e6:.1f} MB stay in the page cache, because the filesystem is in memory or another "
                "process has mapped the file; no cold measurement is possible here, use conditions=[warm]",
                code="still_cached",
            )


def cached_range(path: Path, fd: int, offset: int, nbytes: int) -> int | None:
    """Return the number of bytes of a range of a file in the page cache, in whole pages.

    Linux answers truthfully only to users who may write to the file or own it, so that nobody learns which files other
    users read.

    Args:
        path: the file, for errors.
        fd: a descriptor of the file.
        offset: the start of the range in bytes; a multiple of the page size.
        nbytes: the length of the range in bytes, more than 0.

    Returns:
        None if the system does not tell.
    """
    pages = cachestat(fd, offset, nbytes)
    if pages is not None:
        return pages * mmap.PAGESIZE
    if sys.platform == "linux" and os.fstat(fd).st_uid != os.geteuid() and not os.access(path, os.W_OK):
        return None
    try:
        return _cached(path, fd, offset, nbytes)
    except (FlashMoeError, OSError, ValueError):  # ValueError: the file ends before the range
        return None


def _cached(path: Path, fd: int, offset: int, size: int) -> int:
    """Count the cached bytes among the ``size`` bytes at ``offset`` of the open file ``fd``."""
    with mmap.mmap(fd, size, access=mmap.ACCESS_COPY, offset=offset) as mapped:
        resident = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        if load_libc().mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), resident):
            raise FlashMoeError(
                f"{path}: cannot tell which pages are in the page cache ({os.strerror(ctypes.get_errno())})",
                code="unknown_page_cache",
            )
    return mmap.PAGESIZE * sum(bytes(resident).translate(_LOWEST_BIT))
