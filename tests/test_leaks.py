"""``nothing_left_behind`` detects leaks of a store and ignores the descriptors of a driver."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from systems import needs_io_uring, needs_linux

from flashmoe_mlx.stores.uring import Ring
from flashmoe_mlx.testing.leaks import nothing_left_behind

Open = Callable[[Path | str], int]


@pytest.fixture
def opened() -> Iterator[Open]:
    """A function that opens a file until the end of the test."""
    with contextlib.ExitStack() as stack:

        def leak(path: Path | str) -> int:
            fd = os.open(path, os.O_RDONLY)
            stack.callback(os.close, fd)
            return fd

        yield leak


@pytest.mark.parametrize("driver", [False, True])
def test_an_open_file_of_experts(driver: bool, tmp_path: Path, opened: Open) -> None:
    path = tmp_path / "layer_00.bin"
    path.write_bytes(b"experts")
    with pytest.raises(AssertionError), nothing_left_behind(tmp_path, driver):
        opened(path)


@needs_linux  # on other systems the descriptor of a deleted file has no name
@pytest.mark.parametrize("driver", [False, True])
def test_an_open_deleted_file(driver: bool, tmp_path: Path, opened: Open) -> None:
    path = tmp_path / "layer_00.bin"
    path.write_bytes(b"experts")

    def open_and_remove() -> None:
        opened(path)
        path.unlink()

    with pytest.raises(AssertionError), nothing_left_behind(tmp_path, driver):
        open_and_remove()


@needs_io_uring
@pytest.mark.parametrize("driver", [False, True])
def test_an_open_ring(driver: bool, tmp_path: Path) -> None:
    rings = []
    with pytest.raises(AssertionError), nothing_left_behind(tmp_path, driver):
        rings.append(Ring(1, workers=False))
    rings[0].close()


@pytest.mark.parametrize("driver", [False, True])
def test_a_running_thread(driver: bool, tmp_path: Path) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    with pytest.raises(AssertionError), nothing_left_behind(tmp_path, driver):
        thread.start()
    end.set()
    thread.join()


@pytest.mark.parametrize("path", ["/dev/null", __file__])
def test_a_file_of_a_driver(path: str, tmp_path: Path, opened: Open) -> None:
    """Devices and other files count only if no driver could have opened them."""
    with nothing_left_behind(tmp_path, driver=True):
        opened(path)
    with pytest.raises(AssertionError), nothing_left_behind(tmp_path, driver=False):
        opened(path)


def test_another_file_of_the_same_folder(tmp_path: Path, opened: Open) -> None:
    """An equal number of descriptors is not enough."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    early = os.open(first, os.O_RDONLY)

    def change() -> None:
        os.close(early)
        opened(second)

    with pytest.raises(AssertionError), nothing_left_behind(tmp_path, driver=True):
        change()


@pytest.mark.parametrize("driver", [False, True])
def test_a_closed_file_is_not_a_leak(driver: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    with nothing_left_behind(tmp_path, driver), path.open("rb"):
        pass
