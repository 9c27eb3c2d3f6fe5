"""The available memory respects the machine, the control groups of the process, and the GPU."""

import errno
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil
import pytest
from systems import needs_linux

from flashmoe_mlx import cgroups
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.stores import memory
from flashmoe_mlx.stores.allocation import align_to_cache_line, allocate_huge_pages, use_huge_pages
from flashmoe_mlx.stores.memory import GIB, available_memory, check_memory, total_memory


def control_group(folder: Path, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file {cached // 2}\ninactive_file {cached - cached // 2}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own").write_text("0::/outer/inner\n")
    monkeypatch.setattr(cgroups, "_MEMBERSHIP", tmp_path / "own")
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path / "groups")
    return tmp_path / "groups"


def test_without_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "_MEMBERSHIP", tmp_path / "none")
    assert total_memory() == psutil.virtual_memory().total
    assert 0 < available_memory() <= total_memory()


def test_the_smallest_limit_counts(groups: Path) -> None:
    """Cached files of the group count as free, because the system can drop them."""
    control_group(groups / "outer" / "inner", "max", 2 * 2**20, 0)
    control_group(groups / "outer", str(10 * 2**20), 7 * 2**20, 2 * 2**20)
    assert total_memory() == 10 * 2**20
    assert available_memory() == 5 * 2**20


def test_a_full_group_has_no_free_memory(groups: Path) -> None:
    control_group(groups / "outer" / "inner", "1000", 5000, 0)
    assert available_memory() == 0


@pytest.mark.parametrize("name", ["memory.max", "memory.current", "memory.stat"])
def test_unreadable_groups_are_ignored(groups: Path, name: str) -> None:
    control_group(groups / "outer" / "inner", "1000", 5000, 0)
    (groups / "outer" / "inner" / name).write_text("not\na\nnumber")
    assert total_memory() == psutil.virtual_memory().total


def test_the_refusal_states_both_sizes(groups: Path) -> None:
    control_group(groups / "outer", str(3 * GIB), GIB, 0)
    check_memory("this", 2 * GIB, "take less")
    with pytest.raises(InputError) as caught:
        check_memory("this", 5 * GIB // 2, "take less")
    assert caught.value.code == "not_enough_memory"
    assert str(caught.value) == "this: needs 2.5 GiB of memory, 2.0 GiB are free; take less"


@pytest.mark.parametrize("size", [0, 1000, 2**21, 5 * 2**20 + 17])
def test_large_pages_keep_the_content(size: int) -> None:
    held = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    before = held.tobytes()
    if size:
        use_huge_pages(held.data)
    assert held.tobytes() == before


@pytest.mark.parametrize("dtype", [mx.uint32, mx.bfloat16, mx.float32, mx.uint8])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (1100, 1024)])
def test_aligned_arrays_are_equal(dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    array = (mx.random.uniform(0, 200, shape)).astype(dtype)
    aligned = align_to_cache_line(array)
    assert aligned.dtype == dtype
    assert aligned.shape == shape
    assert mx.array_equal(aligned, array)
    held = memoryview(aligned.reshape(-1).view(mx.uint8))  # type: ignore[arg-type]  # arrays have the buffer protocol
    assert np.frombuffer(held, np.uint8).ctypes.data % 64 == 0


@pytest.mark.parametrize("size", [1, 4096, 5 * 2**20 + 17])
def test_huge_pages_are_zeroed_and_aligned(size: int) -> None:
    allocated = allocate_huge_pages(size)
    assert len(allocated) == size
    array = np.frombuffer(allocated, np.uint8)
    assert array.ctypes.data % 2**21 == 0
    assert not array.any()
    array[-1] = 7
    assert allocated[size - 1] == 7


def test_huge_pages_that_the_system_refuses() -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011  # the error number is checked below
        allocate_huge_pages(2**60)
    assert caught.value.errno in (errno.ENOMEM, errno.EFBIG, errno.EOVERFLOW)


def test_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "slots_on_gpu", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda _: {"free_memory": 3 * GIB})
    assert available_memory() == 3 * GIB
    with pytest.raises(InputError) as caught:
        check_memory("this", 4 * GIB, "take less")
    assert caught.value.code == "not_enough_memory"
    assert "needs 4.0 GiB of GPU memory, 3.0 GiB are free" in str(caught.value)


@pytest.mark.cuda
def test_a_real_gpu() -> None:
    assert memory.slots_on_gpu()
    assert GIB < available_memory() < 2**40


@needs_linux
def test_the_peak_of_a_program_leaves_out_the_program_that_started_it() -> None:
    program = "from flashmoe_mlx.generation.metrics import process_peak_bytes; print(process_peak_bytes())"
    parent = (
        "import subprocess, sys; held = b'x' * (600 << 20)\n"
        "print(subprocess.run([sys.executable, '-c', sys.argv[1]], check=True, capture_output=True, text=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", parent, program], check=True, capture_output=True, text=True)
    assert 0 < int(done.stdout) < 500 << 20
