"""Limit the memory of this process, page cache included, in order to measure as on a smaller machine."""

import ctypes
import math
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
def memory_cap(gib: float | None, least: int = 0) -> Iterator[str | None]:
    """Limit this process to ``gib`` GiB more than it uses now, page cache included.

    The limit is a new cgroup for this process if it can be created. Otherwise the rest of the machine's free memory is
    allocated and locked as ballast.

    ``least`` is the number of bytes below which the process would only fetch its own pages again and again.

    Yields:
        A description of the limit; None if ``gib`` is None.

    Raises:
        InputError: ``gib`` GiB are less than ``least``, or no more are free (code "out_of_range"), or the ballast
            cannot be locked ("cannot_lock_memory").
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
    if limit < least:
        raise InputError(
            f"memory_gib={gib:g}: too small for this model, which needs at least {math.ceil(100 * least / GIB) / 100}",
            code="out_of_range",
        )
    moved = _enter_group(limit)
    if moved is not None:
        group, previous = moved
        try:
            yield f"{gib:g} GiB by a control group"
        finally:
            (previous / "cgroup.procs").write_text(str(os.getpid()))
            group.rmdir()
        return
    ballast = mmap.mmap(-1, free - limit)
    try:
        yield f"{gib:g} GiB by {_fill(ballast)} of {(free - limit) / GIB:.1f} GiB"
    finally:
        ballast.close()


def _enter_group(limit: int) -> tuple[Path, Path] | None:
    """Move this process into a new cgroup with ``limit`` bytes above its current use.

    Returns:
        The directories of the new and the previous cgroup; None if the system does not allow the move.
    """
    first_version = cgroups.own_memory_group()
    previous = first_version or next(iter(cgroups.own_groups()), None)
    if previous is None or not (previous / "cgroup.procs").exists():
        return None
    # In version 2, only the root or a cgroup without processes may delegate the memory controller to its children.
    parent = previous if previous in (first_version, cgroups.root()) else previous.parent
    group = parent / f"flashmoe-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        return None
    try:
        if first_version is None and not (group / "memory.max").exists():
            (parent / "cgroup.subtree_control").write_text("+memory")
        most = limit + psutil.Process().memory_info().rss
        (group / ("memory.max" if first_version is None else "memory.limit_in_bytes")).write_text(str(most))
        for name, value in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", most)):
            if (group / name).exists():
                (group / name).write_text(str(value))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        group.rmdir()
        return None
    return group, previous


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
        f"memory_gib: a ballast of {nbytes / GIB:.1f} GiB cannot be locked in memory ({reason}) and would be swapped "
        "out; raise the limit for locked memory (ulimit -l)",
        code="cannot_lock_memory",
    )
