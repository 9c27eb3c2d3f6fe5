"""The check for what a test leaves behind: it sees what a store leaks, and not what a driver opens."""

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
    """Opens a file and leaves the descriptor open for the time of a test."""
    with contextlib.ExitStack() as stack:

        def leak(path: Path | str) -> int:
            fd = os.open(path, os.O_RDONLY)
            stack.callback(os.close, fd)
            return fd

        yield leak


@pytest.mark.parametrize("driver", [False, True])
def test_a_file_of_the_experts_that_stays_open(driver: bool, tmp_path: Path, opened: Open) -> None:
    path = tmp_path / "layer_00.bin"
    path.write_bytes(b"experts")
    with pytest.raises(AssertionError), nothing_left_behind(tmp_path, driver):
        opened(path)


@needs_linux  # elsewhere a descriptor of a file that is gone has no name
@pytest.mark.parametrize("driver", [False, True])
def test_a_file_that_is_gone_and_stays_open(driver: bool, tmp_path: Path, opened: Open) -> None:
    path = tmp_path / "layer_00.bin"
    path.write_bytes(b"experts")

    def open_and_remove() -> None:
        opened(path)
        path.unlink()

    with pytest.raises(AssertionError), nothing_left_behind(tmp_path, driver):
        open_and_remove()


@needs_io_uring
@pytest.mark.parametrize("driver", [False, True])
def test_a_ring_that_stays_open(driver: bool, tmp_path: Path) -> None:
    rings = []
    with pytest.raises(AssertionError), nothing_left_behind(tmp_path, driver):
        rings.append(Ring(1, workers=False))
    rings[0].close()


@pytest.mark.parametrize("driver", [False, True])
def test_a_thread_that_runs_on(driver: bool, tmp_path: Path) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    with pytest.raises(AssertionError), nothing_left_behind(tmp_path, driver):
        thread.start()
    end.set()
    thread.join()


@pytest.mark.parametrize("path", ["/dev/null", __file__])
def test_a_file_that_a_driver_opens(path: str, tmp_path: Path, opened: Open) -> None:
    """Devices and files elsewhere count only where no driver could have opened them."""
    with nothing_left_behind(tmp_path, driver=True):
        opened(path)
    with pytest.raises(AssertionError), nothing_left_behind(tmp_path, driver=False):
        opened(path)


def test_one_file_in_place_of_another(tmp_path: Path, opened: Open) -> None:
    """As many as before, but not the same."""
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
def test_a_file_that_is_closed_again_is_no_leak(driver: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    with nothing_left_behind(tmp_path, driver), path.open("rb"):
        pass
