"""Make a machine smaller: let a process and the page cache it fills have so much memory and no more."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.storage.memory import GIB, available_memory

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


@contextmanager
def memory_cap(gib: float | None) -> Iterator[str | None]:
    """Hold this process to ``gib`` GiB beyond what it has now, page cache included; yields in words how, or None.

    By a version 2 control group of its own where one can be made (the limit then holds for this process alone), else
    by a ballast: the rest of the machine's free memory is taken and locked.

    Raises:
        InputError: so much is not free, or neither can be done here.
    """
    if gib is None:
        yield None
        return
    free = available_memory()
    if not 0 < gib * GIB < free:
        raise InputError(
            f"memory_gib={gib:g}: must be more than 0 and less than the {free / GIB:.1f} GiB that are free"
        )
    limit = int(gib * GIB)
    group = _own_group(limit)
    if group is not None:
        here, before = group
        try:
            yield f"{gib:g} GiB by a control group"
        finally:
            (before / "cgroup.procs").write_text(str(os.getpid()))
            here.rmdir()
        return
    ballast = mmap.mmap(-1, free - limit)
    try:
        yield f"{gib:g} GiB by {_fill(ballast)} of {(free - limit) / GIB:.1f} GiB"
    finally:
        ballast.close()


def _own_group(limit: int) -> tuple[Path, Path] | None:
    """A new control group that this process was moved into, and the one it came from; None if that cannot be."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
        own = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
        before = _CGROUPS / own
        if not (before / "cgroup.procs").exists():
            return None
        # Only a group without processes, or the root, may hand the memory controller to groups inside it.
        parent = before if before == _CGROUPS else before.parent
        here = parent / f"flashmoe-{os.getpid()}"
        here.mkdir()
    except (OSError, StopIteration):
        return None
    try:
        if not (here / "memory.max").exists():
            (parent / "cgroup.subtree_control").write_text("+memory")
        used = psutil.Process().memory_info().rss
        (here / "memory.max").write_text(str(limit + used))
        swap = here / "memory.swap.max"
        if swap.exists():
            swap.write_text("0")
        (here / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        here.rmdir()
        return None
    return here, before


def _fill(ballast: mmap.mmap) -> str:
    """Have the system give every page of ``ballast``, and keep it there; what it is then."""
    memory, nbytes = np.frombuffer(ballast, np.uint8), len(ballast)
    libc = ctypes.CDLL(None, use_errno=True)
    locked = not libc.mlock(ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(nbytes))
    if locked:
        return "a locked ballast"
    reason = os.strerror(ctypes.get_errno())
    if not psutil.swap_memory().total:
        memory[:: mmap.PAGESIZE] = 1
        return "a ballast (there is no swap)"
    del memory
    raise InputError(
        f"memory_gib: a ballast of {nbytes / GIB:.1f} GiB cannot be locked here ({reason}), and would be swapped out; "
        "raise the limit (ulimit -l)"
    )
