"""Memory that CPU kernels and disks use fast: aligned, and in large pages where the system has them."""

import contextlib
import ctypes
import errno
import mmap
import os
import sys

import mlx.core as mx

_HUGE_PAGE = 2 * 2**20

_CACHE_LINE = 64

# <asm-generic/mman-common.h>; the last two since Linux 5.14 and 6.1
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 14, 23, 25

_POPULATED = 2**29


def own_memory(nbytes: int) -> memoryview:
    """Allocate writable zeros that begin at a multiple of 2 MiB, on Linux in pages of that size where possible.

    Large pages need a five-hundredth of the page faults, and a disk reads past the page cache into small pages at two
    thirds of its speed. All pages are touched at once: the host of a virtual machine may reclaim free memory, and then
    the first touch of a page costs more than reading it from a disk (docs/measurements/2026-11-25-cold.md).

    Raises:
        OSError: the system refuses that much.
    """
    mapped = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    everything = memoryview(mapped)
    address = address_of(everything)
    start = -address % _HUGE_PAGE
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without large pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
        libc = ctypes.CDLL(None, use_errno=True)
        for done in range(0, nbytes, _POPULATED):  # in parts, between which an interrupt is noticed
            part = ctypes.c_size_t(min(_POPULATED, nbytes - done))
            if libc.madvise(ctypes.c_void_p(address + start + done), part, _MADV_POPULATE_WRITE):
                code = ctypes.get_errno()
                if code == errno.EINVAL:  # before Linux 5.14: pages come when they are touched
                    break
                raise OSError(code, os.strerror(code))
    return everything[start : start + nbytes]


def at_cache_lines(array: mx.array) -> mx.array:
    """Copy an array on a CPU to memory that begins at a cache line, in pages of 2 MiB where Linux has them.

    MLX's arrays begin 24 bytes after a cache line, so that each vector of 64 bytes touches two lines: 13 ms a token
    instead of 11.5 (docs/measurements/2026-11-24-cpu.md).
    """
    size = array.dtype.size
    room = mx.zeros(array.size + _CACHE_LINE // size, array.dtype)
    mx.eval(array, room)
    memory = _bytes_of(room)
    start = -address_of(memory) % _CACHE_LINE
    memory[start : start + array.nbytes] = _bytes_of(array)
    use_huge_pages(memory)
    moved = room[start // size : start // size + array.size].reshape(array.shape)
    mx.eval(moved)
    return moved


def _bytes_of(array: mx.array) -> memoryview:
    return memoryview(array.reshape(-1).view(mx.uint8))  # type: ignore[arg-type]  # arrays have the buffer protocol


def address_of(memory: bytearray | memoryview) -> int:
    """Return the address of writable memory of at least one byte."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def use_huge_pages(memory: memoryview) -> None:
    """Turn ``memory``, which has been written to, into pages of 2 MiB where Linux has them.

    A disk reads past the page cache into scattered small pages at little more than half its speed
    (docs/measurements/2026-11-24-stores.md). Elsewhere, and where the kernel has no such pages, nothing changes.
    """
    if sys.platform != "linux" or memory.nbytes < _HUGE_PAGE:
        return
    address = address_of(memory)
    start, end = -(-address // _HUGE_PAGE) * _HUGE_PAGE, (address + memory.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if end <= start:
        return
    libc = ctypes.CDLL(None)
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
