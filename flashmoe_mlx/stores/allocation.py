"""Memory that CPU kernels and disks access fast: aligned, and in large pages where the system has them."""

import contextlib
import errno
import mmap
import os
import sys

import mlx.core as mx

from flashmoe_mlx.stores.libc import MADV_COLLAPSE, MADV_HUGEPAGE, MADV_POPULATE_WRITE, address_of, madvise

_HUGE_PAGE = 2 * 2**20
_CACHE_LINE = 64
_POPULATE_STEP = 2**29
"""Bytes whose pages one system call allocates; Python handles an interrupt only between calls."""


def allocate_huge_pages(nbytes: int) -> memoryview:
    """Allocate ``nbytes`` writable zeros at a multiple of 2 MiB; on Linux in pages of that size where possible.

    With large pages the CPU takes a five-hundredth of the page faults, and direct I/O is 1.5 times as fast as with
    small pages. All pages are touched here, because the host of a virtual machine may have reclaimed free memory, and
    then the first access to a page takes longer than reading the page from a disk
    (docs/measurements/2026-11-25-cold.md).

    Raises:
        OSError: the system does not grant that much memory.
    """
    mapped = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    everything = memoryview(mapped)
    address = address_of(everything)
    start = -address % _HUGE_PAGE
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without large pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
        for done in range(0, nbytes, _POPULATE_STEP):
            code = madvise(address + start + done, min(_POPULATE_STEP, nbytes - done), MADV_POPULATE_WRITE)
            if code == errno.EINVAL:  # before Linux 5.14, which allocates pages when they are touched
                break
            if code:
                raise OSError(code, os.strerror(code))
    return everything[start : start + nbytes]


def align_to_cache_line(array: mx.array) -> mx.array:
    """Copy ``array``, which is on a CPU, to memory that begins at a cache line, in large pages where Linux has them.

    MLX allocates arrays 24 bytes after a cache line, so a vector of 64 bytes touches two lines. Aligned weights take
    11.5 ms instead of 13 ms for each token (docs/measurements/2026-11-24-cpu.md).
    """
    size = array.dtype.size
    room = mx.zeros(array.size + _CACHE_LINE // size, array.dtype)
    mx.eval(array, room)
    memory = _bytes_of(room)
    start = -address_of(memory) % _CACHE_LINE
    memory[start : start + array.nbytes] = _bytes_of(array)
    use_huge_pages(memory)
    aligned = room[start // size : start // size + array.size].reshape(array.shape)
    mx.eval(aligned)
    return aligned


def use_huge_pages(memory: memoryview) -> None:
    """Move the content of ``memory``, whose pages have all been written, into pages of 2 MiB where Linux has them.

    A disk reads past the page cache into scattered small pages at little more than half its speed
    (docs/measurements/2026-11-24-stores.md). On other systems, and on kernels without large pages, nothing changes.
    """
    if sys.platform != "linux" or memory.nbytes < _HUGE_PAGE:
        return
    address = address_of(memory)
    start, end = -(-address // _HUGE_PAGE) * _HUGE_PAGE, (address + memory.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if end <= start:
        return
    for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
        madvise(start, end - start, advice)


def _bytes_of(array: mx.array) -> memoryview:
    """Return the bytes of an evaluated array, writable in place."""
    return memoryview(array.reshape(-1).view(mx.uint8))  # type: ignore[arg-type]  # arrays have the buffer protocol
