"""Reading and publishing files so that a crash, a full disk or a short read never leaves wrong bytes behind."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from flashmoe_mlx.errors import FlashMoeError, PackError


def read_exactly(fd: int, view: memoryview, offset: int) -> int:
    """Fill the writable byte ``view`` from ``offset`` of ``fd``, whatever lengths the reads return; counts the reads.

    Raises:
        EOFError: the file ends inside the range; ``args[0]`` is the byte where it does.
        OSError: the read failed.
    """
    done = reads = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise EOFError(offset + done)
        done += count
        reads += 1
    return reads


def write_exactly(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` of ``fd``."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def sync_directory(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(partial: Path, final: Path) -> None:
    """Give the finished file ``partial`` its final name, durably."""
    fd = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    partial.replace(final)
    sync_directory(final.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that ``path`` holds its old content or all of ``data``, never less."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    publish(partial, path)


def regular_file_size(path: Path) -> int | None:
    """Size in bytes of the regular file at ``path`` itself; None for anything else, symbolic links among it."""
    try:
        found = path.lstat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against other writers; the lock ends with the process, however that ends."""
    lock = folder / ".lock"
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PackError(f"{folder}: another process is writing this pack; wait for it to end") from None
        yield
        lock.unlink(missing_ok=True)
    finally:
        os.close(fd)


@contextlib.contextmanager
def explained_write_errors(folder: Path) -> Iterator[None]:
    """Turn failures of writing below ``folder`` into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise FlashMoeError(
                f"{folder}: no space left ({error.strerror}); make room and run the same command again, it resumes"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise PackError(f"{error.filename or folder}: cannot write there ({error.strerror})") from error
        raise
