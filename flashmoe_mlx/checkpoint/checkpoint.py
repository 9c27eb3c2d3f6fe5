"""A published checkpoint on disk: its config and where each of its tensors lies."""

import contextlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from flashmoe_mlx.checkpoint.safetensors_header import TensorInfo, read_header
from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.expert_store import Extent
from flashmoe_mlx.model.config import ModelConfig
from flashmoe_mlx.pack.files import read_extents
from flashmoe_mlx.untrusted import read_object

_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """A folder with ``config.json`` and safetensors shards, or what is left of it while it is being packed.

    ``tensors`` maps published names to places. ``shards`` are file names inside ``folder``.
    """

    def __init__(self, folder: Path, published: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self.published = published
        self.tensors = tensors
        self.config = ModelConfig.from_json(published)
        self._data_start: dict[str, int] = {}

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read config and headers; no tensor is read.

        Raises:
            CheckpointError: not a checkpoint, an unsupported model, or a shard is missing or damaged.
        """
        published = read_config(folder)
        tensors: dict[str, TensorInfo] = {}
        for shard, promised in _shards(folder).items():
            try:
                found, _ = read_header(folder / shard)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; download it again") from None
            missing = sorted(promised - found.keys())
            if missing:
                raise CheckpointError(f"{folder / shard}: tensor {missing[0]!r} is missing, though {_INDEX} names it")
            for name, tensor in found.items():
                if name in tensors:
                    raise CheckpointError(f"{folder / shard}: tensor {name} is also in {tensors[name].shard}")
                tensors[name] = tensor
        return cls(folder, published, tensors)

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """File names of the shards, in order."""
        return tuple(sorted({tensor.shard for tensor in self.tensors.values()}))

    @property
    def identity(self) -> dict[str, str]:
        """Where the checkpoint came from, for people: a ``name``, and a ``revision`` where there is one."""
        return {"name": self.folder.resolve().name}

    def stamps(self) -> dict[str, list[int]]:
        """Size and time of change of every shard that is on disk, so that a change can be noticed."""
        found = {}
        for shard in self.shards:
            with contextlib.suppress(OSError):
                state = (self.folder / shard).stat()
                found[shard] = [state.st_size, state.st_mtime_ns]
        return found

    def ensure(self, shard: str) -> None:
        """Make sure that ``shard`` is on disk before it is read; here it always is."""

    def discard(self, shard: str) -> None:
        """Delete ``shard``."""
        (self.folder / shard).unlink(missing_ok=True)

    def extent(self, tensor: TensorInfo, start: int, nbytes: int) -> Extent:
        """``nbytes`` bytes from byte ``start`` of ``tensor``, as a place in its shard.

        Raises:
            CheckpointError: the shard is gone, or is no longer the file that was indexed.
        """
        path = self.folder / tensor.shard
        if tensor.shard not in self._data_start:
            found, start_of_data = read_header(path)
            if found != {name: known for name, known in self.tensors.items() if known.shard == tensor.shard}:
                raise CheckpointError(f"{path}: its tensors are not those that it had before: the file was replaced")
            self._data_start[tensor.shard] = start_of_data
        return Extent(path, self._data_start[tensor.shard] + tensor.begin + start, nbytes)

    def read(self, tensor: TensorInfo, start: int, nbytes: int) -> bytearray:
        """``nbytes`` bytes from byte ``start`` of ``tensor``; raises as ``extent`` and ``read_extents`` do."""
        return read_extents([self.extent(tensor, start, nbytes)])


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: there is none, or it is not that of a supported model.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: neither a pack (pack.json) nor a checkpoint (config.json)")
    published = read_object(folder / "config.json")
    try:
        ModelConfig.from_json(published)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return published


def is_shard_name(name: Any) -> bool:
    """Whether ``name`` is the plain name of a safetensors file, in no other folder."""
    return isinstance(name, str) and name.isprintable() and "/" not in name and name.endswith(".safetensors")


def _shards(folder: Path) -> dict[str, set[str]]:
    """Shard files and the tensors that the index promises in each."""
    index = folder / _INDEX
    if not index.exists():
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        if not found:
            raise CheckpointError(f"{folder}: no safetensors files here; download the checkpoint again")
        return {name: set() for name in found}
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not is_shard_name(shard):
            raise CheckpointError(f"{index}: {shard!r} is not the name of a safetensors file in this folder")
        shards.setdefault(shard, set()).add(name)
    missing = [shard for shard in sorted(shards) if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards missing, the first is {missing[0]}; "
            "finish the download (hf download)"
        )
    return shards
