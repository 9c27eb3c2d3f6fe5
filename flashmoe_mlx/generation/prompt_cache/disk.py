"""Conversations on disk: an append-only file of keys and values, and one file for each position with a state.

A folder holds the conversations of one model with one set of settings; its name is the hash of these. Every file of a
state names the file of the state before it, the place of the keys and values between the two, and their checksums. Its
own name holds the checksum of its content. Whatever is missing, damaged or from elsewhere is left out.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.prompt_cache.positions import Kind
from flashmoe_mlx.generation.prompt_cache.size import prompt_cache_bytes
from flashmoe_mlx.generation.prompt_cache.tree import Segment, Stored, Tree
from flashmoe_mlx.layers.cache import Checkpoint, SequenceCache
from flashmoe_mlx.models.runnable import RunnableModel

_log = logging.getLogger(__name__)
_VERSION = 1
_KEYS_AND_VALUES = "kv.bin"
_LARGEST_HEADER = 2**24
_PRIVATE = 0o700


class DamagedError(Exception):
    """A segment on disk that cannot be read as it was written."""


class Disk:
    """The conversations of one model on disk.

    Args:
        folder: holds a folder for each set of settings; it is made if it is missing.
        settings: all that determines the numbers in a state, as JSON values.
        limit: the largest size of all files in bytes.
        blank: an empty cache of the model.

    Raises:
        InputError: the folder cannot be used; code "cache_dir".
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], limit: int, blank: SequenceCache) -> None:
        self._blank = blank
        self._limit = limit
        name = blake2b(json.dumps([_VERSION, settings], sort_keys=True, default=str).encode(), digest_size=16)
        self.folder = folder / name.hexdigest()
        try:
            folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            folder.chmod(_PRIVATE)
            self.folder.mkdir(mode=_PRIVATE, exist_ok=True)
            (self.folder / "settings.json").write_text(json.dumps(settings, default=str, indent=1))
            self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise InputError(
                f"cache_dir={folder}: cannot be used ({error.strerror}); choose another folder", code="cache_dir"
            ) from error
        self._writes = True
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._writes = False
            _log.warning("%s: another process uses it; conversations of this process are not kept there", self.folder)

    def close(self) -> None:
        """Let other processes write; may be called again."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock, self._writes = -1, False

    def load(self, tree: Tree, key: Any) -> list[Segment]:
        """Add all segments on disk to ``tree``, without their contents; return them.

        Args:
            tree: an empty tree.
            key: returns the key of tokens.
        """
        found: dict[str, tuple[Path, dict[str, Any]]] = {}
        for file in self.folder.glob("*/*.safetensors"):
            try:
                found[file.name] = file, _read_header(file)
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                _discard(file)
        segments: dict[str, Segment] = {}
        for name in sorted(found, key=lambda name: _end(found[name][1])):
            file, header = found[name]
            try:
                parent = tree.root if header["parent"] is None else segments[header["parent"]]
                tokens = np.array(header["tokens"], np.uint32)
                end, kind, place = int(header["end"]), Kind(header["kind"]), header["place"]
                stored = Stored(file, int(place["offset"]), int(place["size"]), str(place["checksum"]))
                if end != parent.end + len(tokens) or not len(tokens):
                    raise ValueError(name)
            except (KeyError, TypeError, ValueError, OverflowError):
                _discard(file)
                continue
            segment = Segment(parent, tokens, key(tokens.tolist()), end, kind, None, None, 0, stored=stored)
            segments[name] = segment
            tree.add(segment)
        return list(segments.values())

    def read(self, segment: Segment, with_state: bool) -> None:
        """Read the contents of ``segment``.

        Raises:
            DamagedError: they are missing or not as they were written.
        """
        stored = segment.stored
        assert stored is not None
        try:
            content = stored.file.read_bytes()
            if _checksum(content) != stored.file.stem:
                raise DamagedError(f"{stored.file}: its checksum is wrong")
            arrays = mx.load(str(stored.file))
            shapes = _read_header(stored.file)["part"]
            assert isinstance(arrays, dict)
            with (stored.file.parent / _KEYS_AND_VALUES).open("rb") as file:
                file.seek(stored.offset)
                data = file.read(stored.size)
            if len(data) != stored.size or _checksum(data) != stored.checksum:
                raise DamagedError(f"{stored.file.parent / _KEYS_AND_VALUES}: its checksum is wrong")
            if with_state:
                segment.state = self._state(arrays)
            segment.part = self._part(shapes, data, len(segment.tokens))
            os.utime(stored.file.parent)
        except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
            raise DamagedError(f"{stored.file}: {error}") from error

    def write(self, segment: Segment) -> None:
        """Write a new segment with a state; errors of the system are logged and leave it out."""
        parent = segment.parent
        assert parent is not None
        assert segment.part is not None
        if not self._writes or segment.state is None or (parent.parent is not None and parent.stored is None):
            return
        started = parent.stored is None or parent.kind is Kind.SYSTEM
        try:
            self._make_room(segment.part_bytes + segment.state_bytes, parent)
            if started or parent.stored is None:
                folder = Path(tempfile.mkdtemp(dir=self.folder))
            else:
                folder = parent.stored.file.parent
            segment.stored = self._write(folder, segment, parent.stored)
        except OSError as error:
            _log.warning("%s: a conversation could not be kept (%s)", self.folder, error.strerror)

    def discard(self, segment: Segment) -> None:
        """Delete the file of the state of ``segment``."""
        if segment.stored is not None:
            _discard(segment.stored.file)

    def conversations(self) -> list[tuple[Path, int]]:
        """Return the folders of all conversations with their bytes, those used last at the end."""
        folders = [folder for folder in self.folder.iterdir() if folder.is_dir()]
        return [(folder, _size(folder)) for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime)]

    def clear(self) -> None:
        """Delete all conversations."""
        for folder, _ in self.conversations():
            shutil.rmtree(folder, ignore_errors=True)

    def _write(self, folder: Path, segment: Segment, parent: Stored | None) -> Stored:
        part = segment.part or []
        kept = [(index, array) for index, layer in enumerate(part) if layer is not None for array in layer.arrays()]
        data = b"".join(_bytes(array) for _, array in kept)
        place = folder / _KEYS_AND_VALUES
        with place.open("ab") as file:
            offset = file.tell()
            try:
                file.write(data)
                file.flush()
            except OSError:
                file.truncate(offset)
                raise
        checksum = _checksum(data)
        header = {
            "parent": None if parent is None else parent.file.name,
            "tokens": segment.tokens.tolist(),
            "end": segment.end,
            "kind": int(segment.kind),
            "part": [[index, list(array.shape), str(array.dtype).removeprefix("mlx.core.")] for index, array in kept],
            "place": {"offset": offset, "size": len(data), "checksum": checksum},
        }
        arrays = {
            f"{index}.{number}": array
            for index, layer in enumerate(segment.state or [])
            if layer is not None
            for number, array in enumerate(layer.arrays())
        } or {"empty": mx.zeros(1)}
        partial = folder / "partial.safetensors"
        try:
            mx.save_safetensors(str(partial), arrays, {"flashmoe": json.dumps(header)})
            content = partial.read_bytes()
            _checked_complete(content)
            final = folder / f"{_checksum(content)}.safetensors"
            partial.replace(final)
        except (OSError, RuntimeError, ValueError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise error if isinstance(error, OSError) else OSError(0, str(error)) from error
        return Stored(final, offset, len(data), checksum)

    def _make_room(self, nbytes: int, parent: Segment) -> None:
        """Delete the conversations that were used least recently until ``nbytes`` more fit."""
        needed = {segment.stored.file.parent for segment in parent.path() if segment.stored is not None}
        listed = self.conversations()
        total = sum(size for _, size in listed)
        for folder, size in listed:
            if total + nbytes <= self._limit:
                return
            if folder not in needed:
                shutil.rmtree(folder, ignore_errors=True)
                total -= size
        if total + nbytes > self._limit:
            raise OSError(0, f"the limit of {self._limit} bytes is reached")

    def _state(self, arrays: Mapping[str, mx.array]) -> Checkpoint:
        state: Checkpoint = []
        for index, layer in enumerate(self._blank.layers):
            names = sorted(name for name in arrays if name.split(".")[0] == str(index))
            state.append(None if layer.keeps_tokens else type(layer).of_arrays([arrays[name] for name in names], 0))
        mx.eval([array for layer in state if layer is not None for array in layer.arrays()])
        return state

    def _part(self, shapes: list[Any], data: bytes, tokens: int) -> Checkpoint:
        arrays: dict[int, list[mx.array]] = {}
        offset = 0
        for index, shape, dtype in shapes:
            kind = getattr(mx, dtype)
            size = int(np.prod(shape)) * kind.size
            values = mx.array(np.frombuffer(data, np.uint8, size, offset)).view(kind).reshape(shape)
            arrays.setdefault(index, []).append(values)
            offset += size
        part: Checkpoint = []
        for index, layer in enumerate(self._blank.layers):
            part.append(type(layer).of_arrays(arrays[index], tokens) if layer.keeps_tokens else None)
        mx.eval([array for layer in part if layer is not None for array in layer.arrays()])
        return part


def open_disk(folder: Path, gib: float, model_folder: Path, setup: Mapping[str, Any], model: RunnableModel) -> Disk:
    """Open the conversations of a model in ``folder``.

    Args:
        folder: holds the conversations of all models.
        gib: the largest total size of the conversations of this model.
        model_folder: the model's files, whose names, sizes and times of change identify it.
        setup: the settings of the engine. Conversations with other settings that affect numbers are not used.
        model: the model.

    Raises:
        InputError: the folder or the size cannot be used.
    """
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in model_folder.iterdir())
    numbers = ("experts_k", "experts", "activations", "kernels", "replaced_kernels", "kv_bits")
    settings = {
        "files": files,
        "numerics": [version("mlx"), version("flashmoe-mlx"), str(mx.default_device()), str(model.dtype)],
        **{name: setup.get(name) for name in numbers},
    }
    return Disk(folder, settings, prompt_cache_bytes(gib), model.new_cache())


def _bytes(array: mx.array) -> bytes:
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes()


def _checksum(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def _read_header(file: Path) -> dict[str, Any]:
    """Return the header of the file of a state, whose content may be anything."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > _LARGEST_HEADER:
            raise ValueError(file)
        outer = json.loads(opened.read(size))
    header = json.loads(outer["__metadata__"]["flashmoe"])
    if not isinstance(header, dict):
        raise TypeError(file)
    return header


def _end(header: Mapping[str, Any]) -> int:
    end = header.get("end")
    return end if type(end) is int else 0


def _checked_complete(content: bytes) -> None:
    """Raise OSError unless a safetensors file that was just written is complete: the writer may ignore a full disk."""
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError) as error:
        raise OSError(0, "the disk is full") from error
    if len(content) != 8 + size + end:
        raise OSError(0, "the disk is full")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _discard(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()
