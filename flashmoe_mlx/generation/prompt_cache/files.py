"""Files of conversations on disk: a file of keys and values, and a file for each position with a state.

The file of a state is a safetensors file. Its metadata hold a header in JSON: tokens, the file of the state before it,
and the place of the keys and values between the two, with their checksum. Its name holds the checksums of the header
and of the whole file, so that either can be checked without the other.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx

KEYS_AND_VALUES = "kv.bin"
SETTINGS = "settings.json"
_LOCK = "lock"
_PARTIAL = "partial.safetensors"
_METADATA = "flashmoe"
_LARGEST_HEADER = 2**24
UNREADABLE = (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError, RecursionError, MemoryError)
"""Errors of reading a file whose content may be anything."""


def checksum(data: bytes) -> str:
    """Return the checksum of ``data`` as text."""
    return blake2b(data, digest_size=16).hexdigest()


def describe(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``settings`` for people, unless they are there; a power failure may have damaged them.

    Raises:
        OSError: the disk is full or gone.
    """
    text = json.dumps(settings, default=str, indent=1).encode()
    file = folder / SETTINGS
    if not file.exists() or file.read_bytes() != text:
        file.write_bytes(text)


def write_state(folder: Path, arrays: Mapping[str, mx.array], header: Mapping[str, Any]) -> Path:
    """Write the file of a state; a failure leaves no file.

    Raises:
        OSError: the disk is full or gone.
    """
    text = json.dumps(header)
    partial = folder / _PARTIAL
    try:
        mx.save_safetensors(str(partial), dict(arrays) or {"empty": mx.zeros(1)}, {_METADATA: text})
        content = partial.read_bytes()
        _check_complete(content)
        final = folder / f"{checksum(text.encode())}-{checksum(content)}.safetensors"
        partial.replace(final)
    except (OSError, RuntimeError, ValueError) as error:
        delete(partial)
        raise error if isinstance(error, OSError) else OSError(0, str(error)) from error
    return final


def state_files(folder: Path) -> Iterator[Path]:
    """Yield the files of the states of all conversations in ``folder``, the folder of a model, that can be listed."""
    found: list[Path] = []
    with contextlib.suppress(OSError):
        for conversation in conversation_folders(folder):
            with contextlib.suppress(OSError):
                found += conversation.glob("*.safetensors")
    yield from (file for file in found if file.name != _PARTIAL and file.is_file())


def delete_partial_files(folder: Path) -> None:
    """Delete what interrupted writes have left; conversations without any state are deleted as a whole."""
    for conversation in conversation_folders(folder):
        delete(conversation / _PARTIAL)
        if not any(conversation.glob("*.safetensors")):
            delete(conversation / KEYS_AND_VALUES)
            with contextlib.suppress(OSError):
                conversation.rmdir()


def read_header(file: Path) -> dict[str, Any]:
    """Return the header of the file of a state, whose content may be anything.

    Raises:
        ValueError: the file is damaged. Other errors in ``UNREADABLE`` are possible.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > _LARGEST_HEADER:
            raise ValueError(f"{file}: its header is too large")
        text = json.loads(opened.read(size))["__metadata__"][_METADATA]
    if checksum(text.encode()) != file.name.partition("-")[0]:
        raise ValueError(f"{file}: the checksum of its header is wrong")
    header = json.loads(text)
    if not isinstance(header, dict):
        raise TypeError(f"{file}: its header is not an object")
    return header


def read_arrays(file: Path) -> dict[str, mx.array]:
    """Return the arrays of the file of a state.

    Raises:
        ValueError: the file is damaged. Other errors in ``UNREADABLE`` are possible.
    """
    if checksum(file.read_bytes()) != file.stem.partition("-")[2]:
        raise ValueError(f"{file}: its checksum is wrong")
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    return arrays


def append(file: Path, data: bytes) -> int:
    """Append ``data`` to ``file`` and return its offset there; a failure leaves the file as it was.

    Raises:
        OSError: the disk is full or gone.
    """
    with file.open("ab", buffering=0) as opened:
        offset = opened.tell()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[opened.write(rest) :]
        except OSError:
            opened.truncate(offset)
            raise
    return offset


def cut(file: Path, size: int) -> None:
    """Shorten ``file`` to ``size`` bytes; a failure leaves bytes that nothing refers to."""
    with contextlib.suppress(OSError):
        os.truncate(file, size)


def delete(file: Path) -> None:
    """Delete ``file`` if it exists and can be deleted."""
    with contextlib.suppress(OSError):
        file.unlink()


def lock(folder: Path) -> int | None:
    """Return the open file by which this process alone writes in ``folder``; None if another process does.

    Raises:
        OSError: the file of the lock cannot be made.
    """
    descriptor = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def conversation_folders(folder: Path) -> list[Path]:
    """Return the folders of the conversations of a model, the one used last at the end."""
    folders = [entry for entry in folder.iterdir() if entry.is_dir()]
    return sorted(folders, key=lambda entry: entry.stat().st_mtime_ns)


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in ``folder``."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _check_complete(content: bytes) -> None:
    """Raise OSError unless a safetensors file that was just written is complete: the writer may ignore a full disk."""
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError) as error:
        raise OSError(0, "the disk is full") from error
    if len(content) != 8 + size + end:
        raise OSError(0, "the disk is full")
