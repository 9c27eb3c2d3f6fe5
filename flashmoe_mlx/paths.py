"""Paths as people write them, and errors of the system that name the file."""

import errno
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashmoe_mlx.errors import InputError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, a used-up quota, and a limit on the size of files."""


def expand_path(path: str | Path) -> Path:
    """Turn a path from a person into a ``Path``, with ``~`` and ``~user`` replaced by the home folder.

    Raises:
        InputError: the path is blank or too long, holds a null character, or names a home folder that does not exist.
    """
    text = str(path)
    if not text.strip():
        raise InputError("a path is empty; give one, or leave its key out", code="invalid_path")
    if "\0" in text:
        raise InputError(f"{text!r}: a path cannot hold a null character", code="invalid_path")
    try:
        path = Path(text).expanduser() if text.startswith("~") else Path(text)  # "./~x" is no home folder
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
        raise InputError(f"{text!r}: cannot be the name of a file", code="invalid_path") from None
    return path


def as_argument(key: str, path: Path) -> str:
    """Return ``key=path`` as a shell and the command line take it, for a person to copy."""
    special = str(path).startswith("~") or str(path) == "null"
    return shlex.quote(f"{key}={f'./{path}' if special else path}")


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Add ``path`` to errors of the system that name no file, as those of writing to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
