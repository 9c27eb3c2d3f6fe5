"""Conversations on disk: an append-only file of keys and values, and one file for each position with a state.

A folder holds the conversations of one model with one set of settings; its name is the hash of these. Whatever is
missing, damaged or from elsewhere is left out. ``files`` describes the files.
"""

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.prompt_cache import files
from flashmoe_mlx.generation.prompt_cache.files import KEYS_AND_VALUES, SETTINGS, UNREADABLE
from flashmoe_mlx.generation.prompt_cache.positions import Kind
from flashmoe_mlx.generation.prompt_cache.size import prompt_cache_bytes
from flashmoe_mlx.generation.prompt_cache.tree import Segment, Stored, Tree
from flashmoe_mlx.layers.cache import Checkpoint, SequenceCache
from flashmoe_mlx.models.runnable import RunnableModel
from flashmoe_mlx.version import __version__

_log = logging.getLogger(__name__)
_VERSION = 2
_PRIVATE = 0o700
_DESCRIPTION, _TOKEN, _ARRAY = 1024, 8, 256
"""The largest sizes in bytes of a header without tokens, of a token in it, and of the arrays of a layer."""


class DamagedError(Exception):
    """A segment on disk that cannot be read as it was written."""


class Disk:
    """The conversations of one model on disk.

    Args:
        folder: holds a folder for each set of settings; it is made if it is missing.
        settings: all that determines the numbers in a state, as JSON values.
        about: what people read about the model in the folder, as JSON values.
        limit: the largest size of all files in bytes.
        blank: an empty cache of the model.

    Raises:
        InputError: the folder cannot be used; code "cache_dir".
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], about: Mapping[str, Any], limit: int, blank: SequenceCache
    ) -> None:
        self._blank = blank
        self._limit = limit
        name = blake2b(json.dumps([_VERSION, settings], sort_keys=True, default=str).encode(), digest_size=16)
        self.folder: Path = folder / name.hexdigest()
        self._segments: dict[Path, list[Segment]] = {}
        """The segments in the folder of each conversation."""
        self._lock: int | None = None
        try:
            _make_private(folder)
            self.folder.mkdir(mode=_PRIVATE, exist_ok=True)
            self._lock = files.lock(self.folder)
            if self._lock is not None:
                files.describe(self.folder, {**about, **settings})
                files.delete_partial_files(self.folder)
                self._make_room(0, set(), [])
        except OSError as error:
            self.close()
            raise InputError(
                f"cache_dir={folder}: cannot be used ({error.strerror}); choose another folder", code="cache_dir"
            ) from error
        if self._lock is None:
            _log.warning("%s: another process uses it; conversations of this process are not kept there", self.folder)

    def close(self) -> None:
        """Let other processes write; may be called again."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def load(self, tree: Tree, key: Any) -> list[Segment]:
        """Add all segments on disk to ``tree``, without their contents; return them.

        Args:
            tree: an empty tree.
            key: returns the key of tokens.
        """
        found: dict[str, tuple[Path, dict[str, Any]]] = {}
        for file in files.state_files(self.folder):
            try:
                found[file.name] = file, files.read_header(file)
            except UNREADABLE:
                self._delete(file)
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
            except (*UNREADABLE, OverflowError):
                self._delete(file)
                continue
            segment = Segment(parent, tokens, key(tokens.tolist()), end, kind, None, None, 0, stored=stored)
            segments[name] = segment
            tree.add(segment)
            self._segments.setdefault(file.parent, []).append(segment)
        return list(segments.values())

    def read(self, segment: Segment, with_state: bool) -> None:
        """Read the keys and values of ``segment``, and its state if wanted.

        Raises:
            DamagedError: they are missing or not as they were written.
        """
        stored = segment.stored
        assert stored is not None
        try:
            state = self._state(files.read_arrays(stored.file)) if with_state else segment.state
            shapes = files.read_header(stored.file)["part"]
            with (stored.file.parent / KEYS_AND_VALUES).open("rb") as file:
                file.seek(stored.offset)
                data = file.read(stored.size)
            if len(data) != stored.size or files.checksum(data) != stored.checksum:
                raise DamagedError(f"{stored.file.parent / KEYS_AND_VALUES}: its checksum is wrong")
            segment.part = self._part(shapes, data, len(segment.tokens))
            segment.state = state
        except (*UNREADABLE, OverflowError) as error:
            raise DamagedError(f"{stored.file}: {error}") from error

    def write(self, segment: Segment) -> list[Segment]:
        """Write a new segment with a state; errors of the system are logged and leave it out.

        Returns:
            The segments that had to be deleted to make room.
        """
        parent = segment.parent
        assert parent is not None
        assert segment.part is not None
        if self._lock is None or segment.state is None or (parent.parent is not None and parent.stored is None):
            return []
        removed: list[Segment] = []
        made: Path | None = None
        try:
            needed = {part.stored.file.parent for part in parent.path() if part.stored is not None}
            described = _DESCRIPTION + _TOKEN * len(segment.tokens) + _ARRAY * len(segment.state)
            self._make_room(segment.part_bytes + segment.state_bytes + described, needed, removed)
            if parent.stored is None or parent.kind is Kind.SYSTEM:
                folder = made = Path(tempfile.mkdtemp(dir=self.folder))
            else:
                folder = parent.stored.file.parent
            segment.stored = self._write(folder, segment, parent.stored)
            self._segments.setdefault(folder, []).append(segment)
            self.touch(segment)
        except OSError as error:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            _log.warning("%s: a conversation could not be kept (%s)", self.folder, error.strerror)
        return removed

    def touch(self, segment: Segment) -> None:
        """Mark the conversation up to ``segment`` as used; its beginning, which others may share, outlasts its end."""
        now = time.time_ns()
        folders = [part.stored.file.parent for part in reversed(segment.path()) if part.stored is not None]
        for later, folder in enumerate(dict.fromkeys(folders)):
            with contextlib.suppress(OSError):
                os.utime(folder, ns=(now, now + later))

    def discard(self, segment: Segment) -> None:
        """Delete the file of the state of ``segment``."""
        if segment.stored is not None:
            self._delete(segment.stored.file)
            segments = self._segments.get(segment.stored.file.parent, [])
            if segment in segments:
                segments.remove(segment)
            segment.stored = None

    def clear(self) -> None:
        """Delete all conversations."""
        if self._lock is not None:
            for folder in files.conversation_folders(self.folder):
                shutil.rmtree(folder, ignore_errors=True)
            self._segments.clear()

    def _delete(self, file: Path) -> None:
        """Delete a file, unless another process may be writing it."""
        if self._lock is not None:
            files.delete(file)

    def _write(self, folder: Path, segment: Segment, parent: Stored | None) -> Stored:
        part = segment.part or []
        kept = [(index, array) for index, layer in enumerate(part) if layer is not None for array in layer.arrays()]
        data = b"".join(_bytes(array) for _, array in kept)
        offset = files.append(folder / KEYS_AND_VALUES, data)
        checksum = files.checksum(data)
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
        }
        try:
            return Stored(files.write_state(folder, arrays, header), offset, len(data), checksum)
        except OSError:
            files.cut(folder / KEYS_AND_VALUES, offset)
            raise

    def _make_room(self, nbytes: int, needed: set[Path], removed: list[Segment]) -> None:
        """Delete the conversations that were used least recently until ``nbytes`` more fit.

        Args:
            nbytes: the size of a new segment.
            needed: the folders of the conversation before it, which stay.
            removed: takes the segments that are deleted.

        Raises:
            OSError: nothing else can be deleted.
        """
        listed = [(folder, files.folder_size(folder)) for folder in files.conversation_folders(self.folder)]
        total = sum(size for _, size in listed)
        for folder, size in listed:
            if total + nbytes <= self._limit:
                return
            if folder not in needed:
                shutil.rmtree(folder, ignore_errors=True)
                for segment in self._segments.pop(folder, []):
                    segment.stored = None
                    removed.append(segment)
                total -= size
        if total + nbytes > self._limit:
            raise OSError(0, f"the limit of {self._limit} bytes is reached")

    def _state(self, arrays: Mapping[str, mx.array]) -> Checkpoint:
        state: Checkpoint = []
        for index, layer in enumerate(self._blank.layers):
            names = sorted(name for name in arrays if name.split(".")[0] == str(index))
            state.append(None if layer.keeps_tokens else type(layer).of_arrays([arrays[name] for name in names], 0))
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
    contents = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in model_folder.iterdir())
    numbers = ("experts_k", "experts", "activations", "kernels", "replaced_kernels", "kv_bits")
    settings = {
        "files": contents,
        "numerics": [version("mlx"), __version__, str(mx.default_device()), str(model.dtype)],
        **{name: setup.get(name) for name in numbers},
    }
    return Disk(folder, settings, {"model": str(model_folder)}, prompt_cache_bytes(gib), model.new_cache())


def _make_private(folder: Path) -> None:
    """Make ``folder`` readable by its owner only, unless it is a folder with other files.

    Raises:
        OSError: it cannot be made or changed.
    """
    folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
    if all((entry / SETTINGS).exists() for entry in folder.iterdir()):
        folder.chmod(_PRIVATE)


def _bytes(array: mx.array) -> bytes:
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes()


def _end(header: Mapping[str, Any]) -> int:
    end = header.get("end")
    return end if type(end) is int else 0
