"""Files in the page cache are measured and evicted."""

import os
from pathlib import Path

import pytest
from pack_oracle import assert_one_line
from systems import needs_linux

from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.stores import page_cache
from flashmoe_mlx.stores.memory import total_memory
from flashmoe_mlx.stores.page_cache import cached_bytes, evict

PAGE = os.sysconf("SC_PAGESIZE")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A new file of three pages and a byte."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * PAGE + 1))
    return path


def test_a_new_file_is_cached(file: Path) -> None:
    assert cached_bytes(file) == 4 * PAGE


def test_an_empty_file_has_no_pages(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert cached_bytes(tmp_path / "empty") == 0


def test_a_file_larger_than_memory_is_measured(tmp_path: Path) -> None:
    """The system refuses private mappings that are larger than its memory."""
    size = 2 * total_memory() // PAGE * PAGE
    with (tmp_path / "large").open("wb") as file:
        file.truncate(size)
        file.seek(size - PAGE)
        file.write(bytes(PAGE))
    assert cached_bytes(tmp_path / "large") == PAGE


def in_memory(folder: Path) -> bool:
    """Return whether files in ``folder`` exist only in the page cache."""
    kinds = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    mounts = {Path(point): kind for _, point, kind, *_ in kinds}
    return next(mounts[parent] for parent in (folder, *folder.parents) if parent in mounts) in ("tmpfs", "ramfs")


@needs_linux
def test_evicted_files_leave_the_page_cache(file: Path) -> None:
    """Dirty pages are written before they are dropped, and reads bring pages back."""
    content = file.read_bytes()
    if in_memory(file.parent):
        with pytest.raises(FlashMoeError) as caught:
            evict([file])
        assert caught.value.code == "still_cached"
        return
    evict([file])
    assert cached_bytes(file) == 0
    evict([file])
    assert file.read_bytes() == content
    assert cached_bytes(file) == 4 * PAGE


@needs_linux
def test_files_in_memory_are_refused() -> None:
    folder = Path("/dev/shm")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        pytest.skip("no filesystem in memory")
    path = folder / f"flashmoe-test-{os.getpid()}"
    try:
        path.write_bytes(bytes(PAGE))
        with pytest.raises(FlashMoeError) as caught:
            evict([path])
        assert caught.value.code == "still_cached"
        assert_one_line(caught.value)
    finally:
        path.unlink()


def test_another_system_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache.sys, "platform", "darwin")
    with pytest.raises(FlashMoeError) as caught:
        evict([file])
    assert caught.value.code == "unsupported_system"
