"""Measure the available memory, refuse larger allocations before they happen, and allocate large pages."""

import contextlib
import ctypes
import errno
import mmap
import os
import sys
from pathlib import Path

import mlx.core as mx
import psutil

from flashmoe_mlx.errors import InputError

_OWN_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
GIB = 2**30
_HUGE_PAGE = 2 * 2**20
_CACHE_LINE = 64
# <asm-generic/mman-common.h>; the last two since Linux 5.14 and 6.1
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 14, 23, 25
_POPULATED = 2**29


def total_memory() -> int:
    """Return the memory limit of this process in bytes: the machine's memory, or the limit of its control group."""
    limits = (limit for limit, _ in _cgroup_limits())
    return min(psutil.virtual_memory().total, *limits, 2**63)


def slots_on_gpu() -> bool:
    """Return whether slots are in the memory of an NVIDIA GPU, which the CPU cannot use in place."""
    return mx.cuda.is_available() and mx.default_device() == mx.gpu


def free_gpu_memory() -> int:
    """Return the free bytes of the GPU's memory."""
    return int(mx.device_info(mx.gpu)["free_memory"])


def available_memory() -> int:
    """Return the bytes that slots can take now.

    This is free GPU memory if the slots are on a GPU. Otherwise it is memory that can be allocated without swapping,
    including page cache that can be dropped.
    """
    if slots_on_gpu():
        return free_gpu_memory()
    free = (limit - used for limit, used in _cgroup_limits())
    return max(0, min(psutil.virtual_memory().available, *free, 2**63))


def slot_memory() -> tuple[int, str]:
    """Return the largest possible size of all slots in bytes, and the beginning of a clause that states it."""
    if slots_on_gpu():
        return free_gpu_memory(), "whose GPU has free"
    return total_memory(), "which has"


def refuse_if_too_large(what: str, nbytes: int, remedy: str) -> None:
    """Raise InputError, with the numbers and the ``remedy``, unless slots can take ``nbytes`` now."""
    available = available_memory()
    if nbytes > available:
        kind = "GPU memory" if slots_on_gpu() else "memory"
        raise InputError(
            f"{what}: needs {nbytes / GIB:.1f} GiB of {kind}, {available / GIB:.1f} GiB are free; {remedy}",
            code="not_enough_memory",
        )


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, used less what can be reclaimed) in bytes of every version 2 control group around this process."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    found = []
    for folder in (_CGROUPS / own, *(_CGROUPS / own).parents):
        if not folder.is_relative_to(_CGROUPS):
            break
        try:
            limit = (folder / "memory.max").read_text().strip()
            if limit == "max":
                continue
            used = int((folder / "memory.current").read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(stat["inactive_file"]) + int(stat["active_file"])
            found.append((int(limit), used - cached))
        except (OSError, ValueError, KeyError):
            continue
    return found


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
