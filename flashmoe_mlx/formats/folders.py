"""Folders of models under construction: a lock, a check of the free space, and write errors that name a remedy."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flashmoe_mlx.errors import FlashMoeError, PackError
from flashmoe_mlx.paths import NO_SPACE

_WRONG_PLACE = (
    errno.EACCES, errno.EROFS, errno.EPERM,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
WRITE_ERRORS = (*NO_SPACE, *_WRONG_PLACE)
"""Error numbers for which ``explain_write_errors`` has advice."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against other writers; the system releases the lock when the process ends.

    Raises:
        PackError: another process holds the lock (code "pack_in_use"), or the filesystem has no locks
            ("no_file_locks").
    """
    lock = folder / ".lock"
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another writer may have ended and deleted the file since it was opened here; a lock without its name
            # guards nothing.
            held = os.path.samestat(os.fstat(fd), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        except OSError as error:
            raise PackError(
                f"{folder}: this filesystem has no file locks ({error.strerror}); choose another filesystem",
                code="no_file_locks",
            ) from error
        if not held:
            raise PackError(f"{folder}: another process is writing this pack; wait until it ends", code="pack_in_use")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(fd)


def check_free_space(folder: Path, needed: int, remedy: str) -> None:
    """Raise PackError, code "no_space", unless the disk of ``folder`` has ``needed`` free bytes.

    ``remedy`` is the advice at the end of the message.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise PackError(
            f"{folder}: no space: {needed / 1e9:.1f} GB more are needed, {free / 1e9:.1f} GB are free; {remedy}",
            code="no_space",
        )


@contextlib.contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the system while ``folder`` is written into errors of one line that say what to do.

    Raises:
        FlashMoeError: the disk is full (code "disk_full"), or the system reported an error without a known remedy.
        PackError: nothing can be written to that place (code "cannot_write_pack").
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in NO_SPACE:
            raise FlashMoeError(
                f"{folder}: no space left ({reason}); make room and run the same command again to resume",
                code="disk_full",
            ) from error
        if error.errno in _WRONG_PLACE:
            raise PackError(
                f"{error.filename or folder}: cannot write there ({reason})", code="cannot_write_pack"
            ) from error
        raise FlashMoeError(f"{error.filename or folder}: {reason}") from error
