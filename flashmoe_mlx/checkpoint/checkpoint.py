"""A published checkpoint on disk: its config and where each of its tensors lies."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from flashmoe_mlx.checkpoint.safetensors_header import TensorInfo, read_header
from flashmoe_mlx.checkpoint.support import gguf_advice, refuse_unsupported
from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.expert_store import Extent
from flashmoe_mlx.model.fields import shown
from flashmoe_mlx.pack.files import read_extents
from flashmoe_mlx.untrusted import read_object

INDEX = "model.safetensors.index.json"
_LARGEST_INDEX = 512 * 2**20
"""The largest that is known, of Kimi K3, has 57 MiB."""
_OTHER_WEIGHTS = ("adapter", "consolidated", "optimizer", "training", "mmproj", "vision", "visual", "mtp", "draft")
"""How files begin that hold something else than the model."""
_NUMBERED = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


class Checkpoint:
    """A folder with ``config.json`` and safetensors shards, or what is left of it while it is being packed.

    ``tensors`` maps published names to places. ``shards`` are file names inside ``folder``.
    """

    def __init__(self, folder: Path, published: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self.published = published
        self.tensors = tensors
        self.config = refuse_unsupported(published, folder)
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
                raise CheckpointError(f"{error}; download it again", code="damaged_shard") from None
            missing = sorted(promised - found.keys())
            if missing:
                raise CheckpointError(
                    f"{folder / shard}: tensor {missing[0]!r} is missing, though {INDEX} names it; download that file "
                    "again",
                    code="incomplete_shard",
                )
            for name, tensor in found.items():
                if name in tensors:
                    raise CheckpointError(
                        f"{folder / shard}: tensor {name} is also in {tensors[name].shard}", code="duplicate_tensor"
                    )
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
                raise CheckpointError(
                    f"{path}: its tensors are not those that it had before: the file was replaced",
                    code="shard_replaced",
                )
            self._data_start[tensor.shard] = start_of_data
        return Extent(path, self._data_start[tensor.shard] + tensor.begin + start, nbytes)

    def read(self, tensor: TensorInfo, start: int, nbytes: int) -> bytearray:
        """``nbytes`` bytes from byte ``start`` of ``tensor``; raises as ``extent`` and ``read_extents`` do."""
        return read_extents([self.extent(tensor, start, nbytes)])


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: there is none, or it is not that of a model that can be run.
    """
    if is_gguf(folder):
        raise gguf_advice(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; give the folder of a checkpoint", code="not_a_folder")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder", code="no_such_folder")
    if not (folder / "config.json").is_file():
        if (folder / "config.json").is_symlink():
            raise CheckpointError(
                f"{folder / 'config.json'}: a link to a file that is not there; download the checkpoint again",
                code="broken_link",
            )
        raise CheckpointError(
            f"{folder}: neither a pack (pack.json) nor a checkpoint (config.json){_found_instead(folder)}",
            code="no_model",
        )
    published = read_object(folder / "config.json")
    refuse_unsupported(published, folder)
    return published


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is a GGUF file, by its name or its first bytes."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"
    except OSError:
        return False


def is_shard_name(name: Any) -> bool:
    """Whether ``name`` is the plain name of a safetensors file, in no other folder."""
    return isinstance(name, str) and name.isprintable() and "/" not in name and name.endswith(".safetensors")


def _found_instead(folder: Path) -> str:
    """What to add of a folder that is something else."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if any(name.lower().endswith(".gguf") for name in names):
        return "; its weights are in GGUF, which cannot be read: use the original safetensors checkpoint"
    if "adapter_config.json" in names:
        return "; it holds an adapter (LoRA): merge it into its model first"
    if "params.json" in names or any(name.startswith("consolidated.") for name in names):
        return "; it has the layout of its makers: use the one with config.json, for transformers"
    for name in names:
        if (folder / name / "config.json").is_file():
            return f"; there is one in {folder / name}"
    if "snapshots" in names:
        return "; a folder of the hub's cache: give the folder inside its snapshots/"
    return ""


def _without_index(folder: Path) -> list[str]:
    """Return the names of the weight files of a folder without an index.

    As mlx-lm: ``model*.safetensors``. Only where there is none of these, any other file counts that is not known for
    something else. Names that begin with a dot are nobody's weights: macOS leaves such files on foreign disks.
    """
    names = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    found = [name for name in names if name.startswith("model")]
    found = found or [name for name in names if not name.startswith(_OTHER_WEIGHTS)]
    for first, total in {match.group(1, 2) for match in map(_NUMBERED.fullmatch, found) if match}:
        wanted = [f"{first}-{number:05d}-of-{total}.safetensors" for number in range(1, min(int(total), 10_000) + 1)]
        _refuse_missing(folder, [name for name in wanted if name not in found], len(wanted))
    return found


def _refuse_missing(folder: Path, missing: Sequence[str], total: int) -> None:
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {total} shards missing, the first is {missing[0]}; "
            "finish the download (hf download)",
            code="missing_shards",
        )


def _shards(folder: Path) -> dict[str, set[str]]:
    """Shard files and the tensors that the index promises in each."""
    index = folder / INDEX
    if not index.exists():
        found = _without_index(folder)
        if not found:
            instead = _found_instead(folder) or "; download the checkpoint"
            raise CheckpointError(f"{folder}: no safetensors files of a model here{instead}", code="no_weights")
        return {name: set() for name in found}
    weight_map = read_object(index, limit=_LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing", code="invalid_index")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not is_shard_name(shard):
            raise CheckpointError(
                f"{index}: {shown(shard)} is not the name of a safetensors file in this folder",
                code="invalid_index",
            )
        shards.setdefault(shard, set()).add(name)
    _refuse_missing(folder, [shard for shard in sorted(shards) if not (folder / shard).is_file()], len(shards))
    return shards
