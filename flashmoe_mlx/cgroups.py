"""The control groups of this process on Linux; elsewhere there are none."""

from pathlib import Path

_MEMBERSHIP = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def root() -> Path:
    """Return the folder of the root group of version 2."""
    return _ROOT


def own_groups() -> list[Path]:
    """Return the folders of this process's version 2 group and of all groups above it, innermost first."""
    own = _memberships().get("")
    if own is None:
        return []
    folder = _ROOT / own
    return [group for group in (folder, *folder.parents) if group.is_relative_to(_ROOT)]


def cpu_quota() -> int | None:
    """Return the cores that all groups (versions 1 and 2) allow this process, rounded up; None without a limit."""
    limits = []
    for group in own_groups():
        match _numbers(group / "cpu.max"):
            case [quota, period]:
                limits.append(quota / period)
    for controllers, path in _memberships().items():
        if "cpu" in controllers.split(","):
            group = _ROOT / controllers / path
            match _numbers(group / "cpu.cfs_quota_us"), _numbers(group / "cpu.cfs_period_us"):
                case [[quota, *_], [period, *_]] if quota > 0 and period > 0:
                    limits.append(quota / period)
    return round(min(limits) + 0.49) if limits else None


def own_memory_group() -> Path | None:
    """Return the folder of this process's group in the memory hierarchy of version 1; None without one."""
    for controllers, path in _memberships().items():
        if "memory" in controllers.split(","):
            # A container sees its own group as the root, but may see the path from outside.
            folders = (_ROOT / controllers / path, _ROOT / controllers)
            return next((folder for folder in folders if (folder / "memory.limit_in_bytes").exists()), None)
    return None


def memory_limits() -> list[tuple[int, int]]:
    """Return (limit, used) in bytes for each group around this process (versions 1 and 2) that limits memory.

    ``used`` leaves out cached files, which the system can drop.
    """
    found = []
    own = own_memory_group()
    groups = [(group, "memory.max", "memory.current", "") for group in own_groups()]
    groups += [(own, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")] if own else []
    for folder, limit, current, prefix in groups:
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("inactive", "active"))
        except (OSError, ValueError, KeyError):
            continue
        match _numbers(folder / limit), _numbers(folder / current):
            case [[most], [used]]:
                found.append((most, used - cached))
    return found


def _memberships() -> dict[str, str]:
    """Return the relative path of this process's group by the controllers of its hierarchy; "" stands for version 2."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except (OSError, ValueError):
        return {}
    fields = (line.split(":", 2) for line in lines)
    return {field[1]: field[2].lstrip("/") for field in fields if len(field) == 3}


def _numbers(path: Path) -> list[int]:
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):  # there is no file, or it says "max"
        return []
