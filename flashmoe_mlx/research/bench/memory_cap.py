"""Limit the memory of this process and of the page cache that it fills, to measure as on a smaller machine."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from flashmoe_mlx import cgroups
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.stores.memory import GIB, available_memory


@contextmanager
def memory_cap(gib: float | None) -> Iterator[str | None]:
    """Limit this process to ``gib`` GiB more than it uses now, page cache included.

    Yields a description of the limit, or None without one. The limit is a new version 2 control group for this process
    where one can be made; elsewhere the rest of the machine's free memory is allocated and locked, as a ballast.

    Raises:
        InputError: less than ``gib`` GiB is free (code "out_of_range"), or the ballast cannot be locked
            ("cannot_lock_memory").
    """
    if gib is None:
        yield None
        return
    free = available_memory()
    if not 0 < gib * GIB < free:
        raise InputError(
            f"memory_gib={gib:g}: must be more than 0 and less than the {free / GIB:.1f} GiB that are free",
            code="out_of_range",
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
    """Move this process into a new control group; return the new and the previous group, or None where impossible."""
    groups = cgroups.own_groups()
    if not groups or not (groups[0] / "cgroup.procs").exists():
        return None
    before = groups[0]
    # Only a group without processes, or the root, may hand the memory controller to groups inside it.
    parent = before if before == cgroups.root() else before.parent
    here = parent / f"flashmoe-{os.getpid()}"
    try:
        here.mkdir()
    except OSError:
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
    """Fault in and lock every page of ``ballast``; return a description of how it is held."""
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
        "raise the limit (ulimit -l)",
        code="cannot_lock_memory",
    )
