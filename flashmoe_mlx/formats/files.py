"""Reading and publishing files so that a crash, a full disk or a short read never leaves wrong bytes behind."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flashmoe_mlx.errors import FlashMoeError, InputError, PackError
from flashmoe_mlx.formats.extents import Extent
from flashmoe_mlx.paths import name_in_errors

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WRONG_PLACE = (
    errno.EACCES, errno.EROFS, errno.EPERM,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
WRITE_ERRORS = (*_NO_SPACE, *_WRONG_PLACE)
"""Error numbers for which ``explained_write_errors`` has advice."""


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


def read_extents(extents: Sequence[Extent]) -> bytearray:
    """Read the bytes of ``extents``, joined.

    Raises:
        InputError: a file ends inside its extent.
        FlashMoeError: a file cannot be read.
    """
    data = bytearray(sum(extent.nbytes for extent in extents))
    done = 0
    for extent in extents:
        try:
            fd = os.open(extent.path, os.O_RDONLY)
            try:
                read_exactly(fd, memoryview(data)[done : done + extent.nbytes], extent.offset)
            finally:
                os.close(fd)
        except EOFError as error:
            raise InputError(f"{extent.path}: ends at byte {error.args[0]}: it was cut short while in use") from None
        except OSError as error:
            raise FlashMoeError(f"{extent.path}: cannot be read at byte {extent.offset} ({error.strerror})") from error
        done += extent.nbytes
    return data


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
    with name_in_errors(path):
        partial.write_bytes(data)
        publish(partial, path)


def regular_file_size(path: Path) -> int | None:
    """Return the size in bytes of the regular file at ``path``; None for anything else, symbolic links included."""
    try:
        found = path.lstat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against other writers; the lock ends with the process, however that ends.

    Raises:
        PackError: another process holds it, or the filesystem has no locks.
    """
    lock = folder / ".lock"
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A writer that ended just now has taken away the file that was opened: its name no longer guards anything.
            held = os.path.samestat(os.fstat(fd), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        except OSError as error:
            raise PackError(f"{folder}: cannot be locked on this filesystem ({error.strerror})") from error
        if not held:
            raise PackError(f"{folder}: another process is writing this pack; wait for it to end", code="pack_in_use")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(fd)


def refuse_if_too_large(folder: Path, needed: int, remedy: str) -> None:
    """Raise PackError, with ``remedy`` as its advice, unless ``needed`` more bytes fit into ``folder``."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise PackError(
            f"{folder}: no space: it needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free; {remedy}"
        )


@contextlib.contextmanager
def explained_write_errors(folder: Path) -> Iterator[None]:
    """Turn failures of writing below ``folder`` into one line that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _NO_SPACE:
            raise FlashMoeError(
                f"{folder}: no space left ({reason}); make room and run the same command again, it resumes"
            ) from error
        if error.errno in _WRONG_PLACE:
            raise PackError(f"{error.filename or folder}: cannot write there ({reason})") from error
        raise FlashMoeError(f"{error.filename or folder}: {reason}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one file of a run directory.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    with name_in_errors(path):
        path.write_text(json.dumps(content, indent=1, default=str) + "\n")
