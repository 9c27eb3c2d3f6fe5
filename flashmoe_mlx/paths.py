"""Conversion of paths from and to the command line, and errors of the system that name their file."""

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashmoe_mlx.errors import InputError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, an exhausted quota, and a file beyond the size limit."""


def expand_path(path: str | Path) -> Path:
    """Convert a path of the user to a ``Path``, with ``~`` and ``~user`` replaced by the home folder.

    Raises:
        InputError: the path is blank, too long, or holds a null character (code "invalid_path"), or it begins with a
            home folder that does not exist ("no_home_folder").
    """
    text = str(path)
    if not text.strip():
        raise InputError("a path is empty; give a path, or omit its key", code="invalid_path")
    if "\0" in text:
        raise InputError(f"{text!r}: a path cannot contain a null character", code="invalid_path")
    try:
        path = Path(text).expanduser() if text.startswith("~") else Path(text)  # "./~x" is not a home folder
    except RuntimeError:
        user = text.partition("/")[0]
        remedy = "set HOME, or give the full path" if user == "~" else "give the full path"
        raise InputError(f"{text}: there is no home folder for {user}; {remedy}", code="no_home_folder") from None
    try:
        path.lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{text[:40]}...: {error.strerror}", code="invalid_path") from None
    except UnicodeEncodeError:
        raise InputError(f"{text!r}: not a valid file name", code="invalid_path") from None
    return path


def user_cache() -> Path:
    """Return the user's folder for files that can be made again: ``FLASHMOE_CACHE``, or one in the system's place.

    An empty environment variable counts as unset, in accordance with the XDG specification.

    Raises:
        InputError: the user has no home folder; code "no_home_folder".
    """
    chosen = os.environ.get("FLASHMOE_CACHE")
    if chosen:
        return expand_path(chosen)
    return expand_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "flashmoe_mlx"


def as_argument(key: str, path: Path) -> str:
    """Return ``key=path``, quoted for a shell and for the command line."""
    special = str(path).startswith("~") or str(path) == "null"
    return shlex.quote(f"{key}={f'./{path}' if special else path}")


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Add ``path`` to errors of the system that do not name a file, such as the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
