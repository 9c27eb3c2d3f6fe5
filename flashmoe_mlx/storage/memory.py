"""How much memory there is to take, and refusing what does not fit before anything is allocated."""

from pathlib import Path

import psutil

from flashmoe_mlx.errors import InputError

_CGROUPS = Path("/sys/fs/cgroup")
GIB = 2**30


def total_memory() -> int:
    """Bytes of memory that this process could ever have: the machine's, or the limit of its control group."""
    limits = (limit for limit, _ in _cgroup_limits())
    return min(psutil.virtual_memory().total, *limits, 2**63)


def available_memory() -> int:
    """Bytes that can be allocated now without swapping; page cache that can be dropped counts as available."""
    free = (limit - used for limit, used in _cgroup_limits())
    return max(0, min(psutil.virtual_memory().available, *free, 2**63))


def refuse_if_too_large(what: str, nbytes: int, mend: str) -> None:
    """Raise InputError, with the numbers and the ``mend``, unless ``nbytes`` can be allocated now."""
    available = available_memory()
    if nbytes > available:
        raise InputError(f"{what}: needs {nbytes / GIB:.1f} GiB of memory, {available / GIB:.1f} GiB are free; {mend}")


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, used less what can be reclaimed) in bytes of every version 2 control group around this process."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
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
            used = int((folder / "memory.current").read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            found.append((int(limit), used - int(stat.get("inactive_file", 0)) - int(stat.get("active_file", 0))))
    return found
