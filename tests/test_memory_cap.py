"""Limits of memory by a control group, or by a ballast if a control group cannot be created."""

import os
from pathlib import Path

import psutil
import pytest

from flashmoe_mlx import cgroups
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.research.bench import memory_cap as module
from flashmoe_mlx.research.bench.memory_cap import memory_cap
from flashmoe_mlx.stores.memory import GIB

MIB = 2**20


def test_no_limit_leaves_memory_unrestricted() -> None:
    with memory_cap(None) as described:
        assert described is None


@pytest.mark.parametrize("gib", [0, -1, float("nan"), float("inf"), 10**9])
def test_impossible_limits_are_refused(gib: float) -> None:
    with pytest.raises(InputError) as caught, memory_cap(gib):
        pass
    assert caught.value.code == "out_of_range"


def test_a_limit_below_the_need_of_the_model_is_refused() -> None:
    with pytest.raises(InputError) as caught, memory_cap(0.0001, least=MIB):
        pass
    assert caught.value.code == "out_of_range"
    assert "at least 0.01" in str(caught.value)


def test_a_ballast_occupies_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_enter_group", lambda _: None)
    monkeypatch.setattr(module, "available_memory", lambda: 2 * GIB)
    process = psutil.Process()
    rss_before = process.memory_info().rss
    with memory_cap(2 - 64 * MIB / GIB) as described:
        assert described is not None
        assert described.startswith("1.9375 GiB by a")
        assert described.endswith(("a locked ballast of 0.1 GiB", "a ballast (there is no swap) of 0.1 GiB"))
        assert process.memory_info().rss - rss_before > 60 * MIB
    assert process.memory_info().rss - rss_before < 30 * MIB


def test_a_ballast_that_could_be_swapped_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def __init__(self, *_: object, **__: object) -> None: ...

        def mlock(self, *_: object) -> int:
            return -1

    monkeypatch.setattr(module, "_enter_group", lambda _: None)
    monkeypatch.setattr(module, "available_memory", lambda: GIB)
    monkeypatch.setattr(module.ctypes, "CDLL", Libc)
    monkeypatch.setattr(module.psutil, "swap_memory", lambda: type("Swap", (), {"total": GIB}))
    with pytest.raises(InputError) as caught, memory_cap(0.99):
        pass
    assert caught.value.code == "cannot_lock_memory"


@pytest.mark.parametrize(
    ("own", "group", "limit", "swap"),
    [
        ("session/shell", "session", "memory.max", "memory.swap.max"),
        ("memory/shell", "memory/shell", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    ],
)
def test_a_new_control_group(
    own: str, group: str, limit: str, swap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / own).mkdir(parents=True)
    (tmp_path / own / "cgroup.procs").touch()
    (tmp_path / own / limit).touch()
    membership = tmp_path / "self"
    membership.write_text("0::/session/shell\n" if own.startswith("session") else "0::/\n5:memory:/shell\n")
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "_MEMBERSHIP", membership)
    original, original_rmdir = Path.mkdir, Path.rmdir

    def mkdir(path: Path) -> None:  # the system creates and deletes the files of a group
        original(path)
        for name in (limit, swap, "cgroup.procs"):
            (path / name).touch()

    def rmdir(path: Path) -> None:
        for entry in path.iterdir():
            entry.unlink()
        original_rmdir(path)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    with memory_cap(0.5) as described:
        made = tmp_path / group / f"flashmoe-{os.getpid()}"
        assert described == "0.5 GiB by a control group"
        most = int((made / limit).read_text())
        assert 0 < most - GIB // 2 < 8 * GIB
        assert (made / swap).read_text() == ("0" if limit == "memory.max" else str(most))
        assert (made / "cgroup.procs").read_text() == str(os.getpid())
    assert (tmp_path / own / "cgroup.procs").read_text() == str(os.getpid())
    assert not made.exists()
