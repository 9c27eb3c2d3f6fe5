"""Calls into the system's C library that Python does not offer, or offers only in newer versions."""

import ctypes
import functools
import sys

# <asm-generic/mman-common.h>: since Linux 2.6.38, 5.14, 5.14, and 6.1
MADV_HUGEPAGE, MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_COLLAPSE = 14, 22, 23, 25
# <asm-generic/unistd.h>: since Linux 6.5
_SYS_CACHESTAT = 451
_M_ARENA_MAX = -8  # <malloc.h> of glibc


@functools.cache
def load_libc() -> ctypes.CDLL:
    """Load the C library; its calls leave their error number in ``ctypes.get_errno()``.

    ``ctypes`` releases the interpreter's lock during each call, so other threads run meanwhile.
    """
    return ctypes.CDLL(None, use_errno=True)


def madvise(address: int, nbytes: int, advice: int) -> int:
    """Advise the system about the ``nbytes`` at ``address``, which begins a page; return the error number, or 0."""
    failed = load_libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_int(advice))
    return ctypes.get_errno() if failed else 0


def cachestat(fd: int, offset: int, nbytes: int) -> int | None:
    """Return how many pages of a range of the file ``fd`` are in the page cache; None if the system does not tell."""
    if sys.platform != "linux":
        return None
    place = (ctypes.c_uint64 * 2)(offset, nbytes)
    counts = (ctypes.c_uint64 * 5)()  # cached, dirty, being written, evicted, recently evicted
    failed = load_libc().syscall(_SYS_CACHESTAT, ctypes.c_uint(fd), place, counts, ctypes.c_uint(0))
    return None if failed else counts[0]


def limit_heaps(most: int) -> None:
    """Let new threads share ``most`` heaps, each of which keeps the free memory of its busiest moment; glibc only."""
    set_option = getattr(load_libc(), "mallopt", None)
    if set_option is not None:
        set_option(_M_ARENA_MAX, most)


def release_free_memory() -> None:
    """Return the free pages of all heaps to the system; glibc only."""
    trim = getattr(load_libc(), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def address_of(memory: bytearray | memoryview) -> int:
    """Return the address of writable memory of at least one byte."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
