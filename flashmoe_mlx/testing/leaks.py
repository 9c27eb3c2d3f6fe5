"""Detection of descriptors and threads that a test leaves behind."""

import contextlib
import fcntl
import gc
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

_SECONDS_TO_END = 2.0
_F_GETPATH = 50  # <sys/fcntl.h> of macOS


@contextlib.contextmanager
def nothing_left_behind(folder: Path, driver: bool | None = None) -> Iterator[None]:
    """Assert that the enclosed code leaves no open descriptor and no running thread behind.

    Descriptors and threads that end meanwhile do not count, and a thread that is about to end has two seconds to do so.

    Args:
        folder: a folder above all files of experts.
        driver: whether a driver in this process may open descriptors at any time, as the driver of a GPU does at its
            first use. If so, only files below ``folder`` and rings of io_uring count. None: whether a GPU is in use.
    """
    driver = mx.default_device() == mx.gpu if driver is None else driver
    gc.collect()
    descriptors, threads = _descriptors(folder, driver), set(threading.enumerate())
    yield
    gc.collect()
    deadline = time.monotonic() + _SECONDS_TO_END
    while new := set(threading.enumerate()) - threads:
        if time.monotonic() > deadline:
            raise AssertionError(f"threads left behind: {sorted(thread.name for thread in new)}")
        time.sleep(0.01)
    if opened := _descriptors(folder, driver) - descriptors:
        raise AssertionError(f"descriptors left open: {sorted(opened.elements())}")


def _descriptors(folder: Path, driver: bool) -> Counter[str]:
    """Return the number of descriptors of each file."""
    root = f"{folder.resolve()}/"
    targets = Counter(_target(fd) for fd in [int(entry.name) for entry in Path("/dev/fd").iterdir()])
    if driver:
        targets = Counter({name: n for name, n in targets.items() if name.startswith(root) or "[io_uring]" in name})
    targets.pop("", None)
    return targets


def _target(fd: int) -> str:
    """Return the path of a descriptor, or an empty string if it is closed, like that of the listing itself."""
    try:
        if sys.platform != "linux":
            return fcntl.fcntl(fd, _F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return f"descriptor {fd}" if _is_open(fd) else ""


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
