"""Writing of files so that a crash or a full disk never leaves a file with wrong or missing bytes."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashmoe_mlx.paths import name_in_errors


def write_exactly(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` of the file ``fd``."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def sync(path: Path) -> None:
    """Make the content of a file durable, or the names of the files in a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(partial: Path, final: Path) -> None:
    """Rename the complete file ``partial`` to ``final``, and make its content and name durable."""
    sync(partial)
    partial.replace(final)
    sync(final.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that ``path`` always holds either its old content or all of ``data``.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    partial = path.with_name(path.name + ".partial")
    with name_in_errors(path):
        partial.write_bytes(data)
        publish(partial, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented JSON to a file of a run directory; values of unknown types become their ``str``.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    with name_in_errors(path):
        path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def regular_file_size(path: Path) -> int | None:
    """Return the size in bytes of the regular file at ``path``; None for anything else, symbolic links included."""
    try:
        found = path.lstat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
