"""Compiled kernels on disk: hits, misses, damage, foreign folders and concurrent processes, with NVRTC on a CPU."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_mlx.custom_kernels import code_cache, cuda_text, nvidia, nvrtc, precompiled

KEY = code_cache.key_of("text", "options")
needs_nvrtc = pytest.mark.skipif(
    find_spec("nvidia") is None, reason="pip install nvidia-cuda-nvrtc nvidia-cuda-runtime"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path))
    return tmp_path / "kernels"


def damaged(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def replaced_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replaced_by_a_link(file: Path) -> None:
    file.rename(file.with_suffix(".elsewhere"))
    file.symlink_to(file.with_suffix(".elsewhere"))


def writable_for_others(file: Path) -> None:
    file.parent.chmod(0o777)


@pytest.mark.parametrize(
    "change", [Path.unlink, damaged, truncated, replaced_by_a_folder, replaced_by_a_link, writable_for_others]
)
def test_anything_but_the_stored_code_is_a_miss(folder: Path, change: Callable[[Path], None]) -> None:
    assert code_cache.load(KEY) is None
    code_cache.store(KEY, b"code")
    assert code_cache.load(KEY) == b"code"
    assert folder.stat().st_mode & 0o777 == 0o700
    change(folder / KEY)
    assert code_cache.load(KEY) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_code_of_another_user_is_a_miss(folder: Path) -> None:
    code_cache.store(KEY, b"code")
    os.chown(folder / KEY, 12345, -1)
    assert code_cache.load(KEY) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for chosen in (str(tmp_path / "file"), "/proc/none", "~nobody-at-all/x"):
        monkeypatch.setenv("FLASHMOE_CACHE", chosen)
        code_cache.store(KEY, b"code")
        assert code_cache.load(KEY) is None


def test_a_full_disk_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    code_cache.store(KEY, b"code")
    assert list(folder.iterdir()) == []


@given(st.lists(st.text()), st.lists(st.text()))
def test_different_parts_have_different_keys(one: list[str], other: list[str]) -> None:
    same = "\0".join(one) == "\0".join(other)
    assert (code_cache.key_of(*one) == code_cache.key_of(*other)) == same


@pytest.mark.usefixtures("folder")
def test_concurrent_writers_and_readers() -> None:
    code = bytes(2**20)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: code_cache.load(KEY) if i % 2 else code_cache.store(KEY, code), range(40)))
    assert {None, code} >= set(found)
    assert code_cache.load(KEY) == code


def test_mlx_keeps_its_modules_by_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path))
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "chosen")
    code_cache.keep_modules_of_mlx("sm_90a")
    assert os.environ["MLX_PTX_CACHE_DIR"] == "chosen"
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "")
    code_cache.keep_modules_of_mlx("sm_90a")
    folder = Path(os.environ["MLX_PTX_CACHE_DIR"])
    assert folder.is_dir()
    assert folder.parent == tmp_path
    assert folder.name.endswith("sm_90a")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "file"))
    monkeypatch.delenv("MLX_PTX_CACHE_DIR")
    code_cache.keep_modules_of_mlx("sm_90a")
    assert "MLX_PTX_CACHE_DIR" not in os.environ


TEXT = cuda_text.cuda_text(
    "twice", [("x", mx.bfloat16)], [("y", mx.float32)], "", "y[threadIdx.x] = 2.0f * float(x[x_shape[1]]);", []
)


@needs_nvrtc
def test_a_text_is_compiled_once_for_all_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompiled, "gpu", lambda: nvidia.Gpu(1, 9, 1))
    code = precompiled.MachineCode("twice", TEXT).get()
    assert isinstance(code, bytes)
    assert code.startswith(b"\x7fELF")
    (file,) = folder.iterdir()
    script = f"""
from flashmoe_mlx.custom_kernels import nvidia, nvrtc, precompiled
precompiled.gpu = lambda: nvidia.Gpu(1, 9, 1)
def refuse(*_): raise AssertionError("compiled again")
nvrtc.Compiler.compile = refuse
code = precompiled.MachineCode("twice", {TEXT!r}).get()
print(len(code))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(len(code))], done.stderr
    assert list(folder.iterdir()) == [file]
    monkeypatch.setattr(precompiled, "gpu", lambda: nvidia.Gpu(1, 8, 1))
    assert precompiled.MachineCode("twice", TEXT).get() != code
    assert len(list(folder.iterdir())) == 2


@needs_nvrtc
def test_an_error_in_the_text_is_reported_and_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompiled, "gpu", lambda: nvidia.Gpu(1, 9, 1))
    error = precompiled.MachineCode("twice", TEXT.replace("2.0f", "undeclared")).get()
    assert isinstance(error, nvrtc.CompilerError)
    assert 'identifier "undeclared" is undefined' in str(error)
    assert list(folder.iterdir()) == []


def test_interrupts_leave_kernels_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt at any point of planning or of a call is raised and has no other effect."""
    monkeypatch.setattr(precompiled, "_code", lambda name, text: (name + text).encode())
    monkeypatch.setattr(precompiled, "_compile_all", list)  # Python's start of a thread cannot be interrupted anywhere
    interrupted = 0
    codes = [precompiled.MachineCode("kernel", str(n)) for n in range(8)]
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for step in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + 5e-6 * (step % 100))
                planned = [*codes, precompiled.MachineCode("new", "")]
                precompiled.compile_together(lambda planned=planned: [precompiled.planned(code) for code in planned])
                for _ in range(100):
                    assert all(code.get() for code in codes)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupted > 0
    assert not precompiled.planned(codes[0])
    with ThreadPoolExecutor(1) as other:
        found = other.submit(lambda: [code.get() for code in codes]).result(timeout=10)
    assert found == [f"kernel{n}".encode() for n in range(8)]


def test_sizes_that_a_body_reads() -> None:
    assert cuda_text.shape_reads("x_shape[2] + keys_shape[0] + x_shape[0]", ("keys", "x")) == ((0, 0), (1, 0), (1, 2))
    assert "const int x_shape[] = {0, x_shape_1};" in TEXT
    assert "(const __nv_bfloat16* x, float* y, const int x_shape_1)" in TEXT
