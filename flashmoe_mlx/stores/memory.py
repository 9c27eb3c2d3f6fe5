"""Measure the available memory, refuse larger allocations before they happen, and allocate large pages."""

import mlx.core as mx
import psutil

from flashmoe_mlx import cgroups
from flashmoe_mlx.errors import InputError

GIB = 2**30


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
    """Return (limit, used memory that cannot be reclaimed) in bytes of every limited control group of this process."""
    found = []
    for folder in cgroups.own_groups():
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
