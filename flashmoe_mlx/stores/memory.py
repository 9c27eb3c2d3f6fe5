"""Measurement of the available memory, and a check to make before a large allocation."""

import mlx.core as mx
import psutil

from flashmoe_mlx import cgroups
from flashmoe_mlx.errors import InputError

GIB = 2**30


def total_memory() -> int:
    """Return the memory limit of this process in bytes: that of its control groups, or the memory of the machine."""
    limits = (limit for limit, _ in cgroups.memory_limits())
    return min(psutil.virtual_memory().total, *limits, 2**63)


def slots_on_gpu() -> bool:
    """Return whether slots are in the memory of an NVIDIA GPU, which the CPU cannot access in place."""
    return mx.cuda.is_available() and mx.default_device() == mx.gpu


def free_gpu_memory() -> int:
    """Return the number of free bytes in the memory of the GPU."""
    return int(mx.device_info(mx.gpu)["free_memory"])


def available_memory() -> int:
    """Return the number of bytes that slots can occupy now.

    If slots are on a GPU, this is its free memory. Otherwise it is the memory that the system can give without
    swapping, which includes the page cache.
    """
    if slots_on_gpu():
        return free_gpu_memory()
    free = (limit - used for limit, used in cgroups.memory_limits())
    return max(0, min(psutil.virtual_memory().available, *free, 2**63))


def slot_memory() -> tuple[int, str]:
    """Return the largest possible size of all slots in bytes, and the name of this size for a message."""
    if slots_on_gpu():
        return free_gpu_memory(), "the free memory of its GPU"
    return total_memory(), "its memory"


def check_memory(purpose: str, nbytes: int, remedy: str) -> None:
    """Raise InputError, code "not_enough_memory", unless slots can occupy ``nbytes`` now.

    The message begins with ``purpose`` and ends with the advice ``remedy``.
    """
    available = available_memory()
    if nbytes > available:
        kind = "GPU memory" if slots_on_gpu() else "memory"
        raise InputError(
            f"{purpose}: needs {nbytes / GIB:.1f} GiB of {kind}, {available / GIB:.1f} GiB are free; {remedy}",
            code="not_enough_memory",
        )
