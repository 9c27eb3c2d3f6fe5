"""A published checkpoint on disk: its config, and the place of each tensor."""

import contextlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from flashmoe_mlx.checkpoint.coded import CodedTensor
from flashmoe_mlx.checkpoint.shards import INDEX, broken_link, find_shards, nothing_here
from flashmoe_mlx.checkpoint.support import refuse_gguf_file, refuse_hub_id_of_format, refuse_unsupported
from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.extents import Extent, read_extents
from flashmoe_mlx.formats.safetensors_header import TensorInfo, read_header
from flashmoe_mlx.formats.untrusted import read_object
from flashmoe_mlx.models.config import ModelSize


class Checkpoint:
    """A folder with ``config.json`` and safetensors shards; packing may have deleted some of the shards.

    Attributes:
        folder: the folder.
        published: the content of ``config.json``.
        tensors: the place of each tensor, by published name.
        config: the geometry of the model.
    """

    def __init__(self, folder: Path, published: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self.published = published
        self.tensors = tensors
        self.config: ModelSize = refuse_unsupported(published, folder)
        self._data_start: dict[str, int] = {}

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read config and headers; no tensor is read.

        Raises:
            CheckpointError: there is no checkpoint, the model is not supported, or a shard is missing or damaged.
        """
        published = read_config(folder)
        tensors: dict[str, TensorInfo] = {}
        shards = find_shards(folder)
        listed = set().union(*shards.values())
        for shard, promised in shards.items():
            try:
                found, _ = read_header(folder / shard)
            except CheckpointError as error:
                if error.code == "unsupported_tensor_type":
                    raise
                raise CheckpointError(f"{error}; download it again", code="damaged_shard") from None
            missing = sorted(promised - found.keys())
            if missing:
                raise CheckpointError(
                    f"{folder / shard}: tensor {missing[0]!r} is missing, though {INDEX} names it; download that file "
                    "again",
                    code="incomplete_shard",
                )
            for name, tensor in found.items():
                if name in listed and name not in promised:
                    continue  # the index decides which copy counts
                if name in tensors:
                    raise CheckpointError(
                        f"{folder / shard}: tensor {name} is also in {tensors[name].shard}; remove the file that is "
                        "not part of the model",
                        code="duplicate_tensor",
                    )
                tensors[name] = tensor
        return cls(folder, published, tensors)

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """File names of the shards inside ``folder``, in order."""
        return tuple(sorted({tensor.shard for tensor in self.tensors.values()}))

    @property
    def identity(self) -> dict[str, str]:
        """The origin of the checkpoint for people: a ``name``, and for checkpoints from the hub a ``revision``."""
        return {"name": self.folder.resolve().name}

    def stamps(self) -> dict[str, list[int]]:
        """Return the size in bytes and the modification time in nanoseconds of every shard on disk."""
        found = {}
        for shard in self.shards:
            with contextlib.suppress(OSError):
                state = (self.folder / shard).stat()
                found[shard] = [state.st_size, state.st_mtime_ns]
        return found

    def ensure(self, shard: str) -> None:
        """Bring ``shard`` to disk before it is read; the shards of a local checkpoint are there."""

    def discard(self, shard: str) -> None:
        """Delete ``shard``."""
        (self.folder / shard).unlink(missing_ok=True)

    def extent(self, tensor: TensorInfo, start: int, nbytes: int) -> Extent:
        """Locate ``nbytes`` bytes from byte ``start`` of ``tensor`` in its shard.

        Raises:
            CheckpointError: the shard was deleted, or another file has replaced it.
        """
        path = self.folder / tensor.shard
        if tensor.shard not in self._data_start:
            found, start_of_data = read_header(path)
            if any(found.get(name) != known for name, known in self.tensors.items() if known.shard == tensor.shard):
                raise CheckpointError(
                    f"{path}: the file was replaced and holds other tensors now",
                    code="shard_replaced",
                )
            self._data_start[tensor.shard] = start_of_data
        return Extent(path, self._data_start[tensor.shard] + tensor.begin + start, nbytes)

    def read(self, tensor: TensorInfo, start: int, nbytes: int) -> bytearray:
        """Read ``nbytes`` bytes from byte ``start`` of ``tensor``, decoded if it is a ``CodedTensor``.

        Raises:
            CheckpointError: as ``extent``; or the file cannot be read.
        """
        if isinstance(tensor, CodedTensor):
            return tensor.read(self.read, start, nbytes)
        return read_extents([self.extent(tensor, start, nbytes)])


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: there is no config, or it describes a model that cannot be run.
    """
    refuse_gguf_file(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; give the folder of a checkpoint", code="not_a_folder")
    if not folder.is_dir():
        refuse_hub_id_of_format(str(folder))
        raise CheckpointError(f"{folder}: no such folder", code="no_such_folder")
    if not (folder / "config.json").is_file():
        if (folder / "config.json").is_symlink():
            raise broken_link(folder / "config.json")
        raise nothing_here(folder, "neither a pack (pack.json) nor a checkpoint (config.json)", "no_model")
    published = read_object(folder / "config.json")
    refuse_unsupported(published, folder)
    return published
