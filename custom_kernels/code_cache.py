"""Compiled kernels on disk, in the user's cache folder, for later processes.

Any number of processes may use the folder. A file that is damaged, missing or unreadable is a miss, and a folder that
cannot be written costs later processes their time but is no error. Machine code runs with the user's rights, so the
folder and its files must belong to the user, and nobody else may write to the folder.
"""

import hashlib
import logging
import os
import stat
import tempfile
from importlib.metadata import version
from pathlib import Path

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.paths import user_cache

_log = logging.getLogger(__name__)
_DIGEST_BYTES = 32


def key_of(*parts: str) -> str:
    """Return the key of a result that depends on ``parts``."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load(key: str) -> bytes | None:
    """Return the stored code; None without an intact file."""
    try:
        data = _read_own(_folder() / key)
    except (OSError, InputError) as error:
        _log.debug("no compiled kernel in the cache: %s", error)
        return None
    digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _read_own(path: Path) -> bytes:
    """Return the content of a file; raise OSError for a link, and for a file of another user."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        if os.fstat(file.fileno()).st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to another user")
        return file.read()


def store(key: str, code: bytes) -> None:
    """Store ``code`` if possible."""
    try:
        folder = _folder()
        descriptor, partial = tempfile.mkstemp(dir=folder, prefix="partial-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            Path(partial).replace(folder / key)
        except OSError:
            Path(partial).unlink(missing_ok=True)
            raise
    except (OSError, InputError) as error:
        _log.debug("a compiled kernel cannot be kept: %s", error)


def keep_modules_of_mlx(architecture: str) -> None:
    """Make MLX keep compiled kernels for a GPU of ``architecture`` in the user's cache folder.

    MLX's default is the system's folder for temporary files, which loses them at a restart and which all users share. A
    folder that ``MLX_PTX_CACHE_DIR`` names stays. MLX reads the variable when it compiles for the first time.
    """
    if os.environ.get("MLX_PTX_CACHE_DIR"):
        return
    try:
        os.environ["MLX_PTX_CACHE_DIR"] = str(_folder(f"mlx-{version('mlx')}-{architecture}"))
    except (OSError, InputError) as error:
        _log.debug("MLX keeps compiled kernels in its own place: %s", error)


def _folder(name: str = "kernels") -> Path:
    """Return a folder, which is made if it does not exist; raise PermissionError if others can write to it."""
    folder = user_cache() / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} belongs to another user, or others can write to it")
    return folder
