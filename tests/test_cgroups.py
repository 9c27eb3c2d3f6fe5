"""Control groups of this process, and the number of cores that they allow."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_mlx import cgroups


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 2),
        ("0::/a\n", {"a/cpu.max": "50000 100000"}, 1),
        ("0::/\n", {}, None),
        (
            "4:cpu,cpuacct:/d\n",
            {"cpu,cpuacct/d/cpu.cfs_quota_us": "300000", "cpu,cpuacct/d/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("4:cpu:/d\n", {"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_cpu_quotas(
    membership: str, files: dict[str, str], cores: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(cgroups, "_MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path / "root")
    assert cgroups.cpu_quota() == cores


@pytest.mark.parametrize(
    ("membership", "folder", "names"),
    [
        ("0::/a\n", "a", ("memory.max", "memory.current", "")),
        ("4:memory:/a\n0::/\n", "memory/a", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")),
        ("4:memory:/seen/from/outside\n", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")),
    ],
)
def test_limits_of_memory(
    membership: str, folder: str, names: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, current, prefix = names
    (tmp_path / "cgroup").write_text(membership)
    group = tmp_path / "root" / folder
    group.mkdir(parents=True)
    (group / limit).write_text("1000\n")
    (group / current).write_text("700\n")
    (group / "memory.stat").write_text(f"rss 1\n{prefix}inactive_file 200\n{prefix}active_file 100\n")
    monkeypatch.setattr(cgroups, "_MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path / "root")
    assert cgroups.memory_limits() == [(1000, 400)]
    (group / limit).write_text("max\n")
    assert cgroups.memory_limits() == []


def test_there_may_be_no_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "_MEMBERSHIP", tmp_path / "none")
    assert cgroups.own_groups() == []
    assert cgroups.cpu_quota() is None
    assert cgroups.memory_limits() == []


@given(st.lists(st.text(), max_size=4))
def test_any_membership_gives_folders_inside_the_root(lines: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda _: "\n".join(lines))
        groups = cgroups.own_groups()
    assert all(group.is_relative_to(cgroups.root()) for group in groups)
    assert groups == [] or groups[-1] == cgroups.root()
