"""Find the files in a folder that hold the weights of a model, with or without an index."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flashmoe_mlx.checkpoint.formats import USE_INSTEAD
from flashmoe_mlx.checkpoint.support import gguf_error
from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.fields import shown
from flashmoe_mlx.formats.untrusted import read_object

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LARGEST_INDEX = 512 * 2**20
"""Limit in bytes; the largest known index, of Kimi K3, has 57 MiB."""
_OTHER_WEIGHTS = ("adapter", "consolidated", "optimizer", "training", "mmproj", "vision", "visual", "mtp", "draft")
"""Prefixes of the names of safetensors files without weights of the model."""
_NUMBERED = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_VARIANT = re.compile(r"model\.[^.]+(-\d{5}-of-\d{5})?\.safetensors")
"""Names of copies of the weights in another type, for example ``model.fp16.safetensors``."""
_MOST_SHARDS = 10_000


def find_shards(folder: Path) -> dict[str, set[str]]:
    """Return the shards of the model in ``folder``, each with the tensors that the index lists in it.

    Without an index these sets are empty. Where the index lists missing shards and the folder has a
    ``model.safetensors`` that is not listed, the index is ignored: transformers reads that file first.

    Raises:
        CheckpointError: there are no weights, some are missing, or the index is malformed.
    """
    index = folder / INDEX
    if not index.exists():
        if index.is_symlink():
            raise broken_link(index)
        found = _without_index(folder)
        if not found:
            raise nothing_here(folder, "no safetensors files of a model here", "no_weights", "download the checkpoint")
        return {name: set() for name in found}
    shards = _listed(index)
    missing = [shard for shard in sorted(shards) if not (folder / shard).is_file()]
    if missing and _SINGLE not in shards and (folder / _SINGLE).is_file():
        return {_SINGLE: set()}
    _refuse_missing(folder, missing, len(shards))
    return shards


def is_shard_name(name: Any) -> bool:
    """Return whether ``name`` is the name of a safetensors file without any folder."""
    return isinstance(name, str) and name.isprintable() and "/" not in name and name.endswith(".safetensors")


def nothing_here(folder: Path, problem: str, code: str, remedy: str = "") -> CheckpointError:
    """Return the error for a folder without a model.

    Args:
        folder: the folder.
        problem: the missing files.
        code: the code of the error; files in an unreadable format have a separate code.
        remedy: the advice if the content of the folder suggests none.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if any(name.lower().endswith(".gguf") for name in names):
        return gguf_error(folder)
    other = _other_format(names)
    if other is not None:
        return CheckpointError(f"{folder}: weights in {other} cannot be read; {USE_INSTEAD}", code="unsupported_format")
    instead = _found_instead(folder, names) or remedy
    return CheckpointError(f"{folder}: {problem}{instead and f'; {instead}'}", code=code)


def broken_link(path: Path) -> CheckpointError:
    """Return the error for a link whose target is missing."""
    return CheckpointError(f"{path}: a link whose target is missing; download the checkpoint again", code="broken_link")


def _other_format(names: Iterable[str]) -> str | None:
    for name in names:
        if name.startswith("pytorch_model") and ".bin" in name:
            return "PyTorch's format (pytorch_model.bin)"
        if name.endswith(".npz"):
            return f"NumPy's format ({name})"
    return None


def _found_instead(folder: Path, names: Sequence[str]) -> str:
    if "adapter_config.json" in names:
        return "it holds an adapter (LoRA); merge it into its model first"
    if "params.json" in names or any(name.startswith("consolidated.") for name in names):
        return "it has its publisher's own layout; use the one for transformers (config.json, model*.safetensors)"
    if "config.json" not in names:
        for name in names:
            if (folder / name / "config.json").is_file():
                return f"there is one in {folder / name}"
    if "snapshots" in names:
        return "it is a folder of the hub's cache; give the folder inside its snapshots/"
    return ""


def _without_index(folder: Path) -> list[str]:
    """Return the names of the weight files of a folder without an index.

    As in mlx-lm, these are ``model*.safetensors``. Other safetensors files count only if there are none of these, and
    if their names do not suggest another purpose. Names that begin with a dot never count: macOS leaves such files on
    disks of other systems.
    """
    names = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    found = [name for name in names if name.startswith("model")]
    found = found or [name for name in names if not name.startswith(_OTHER_WEIGHTS)]
    if any(name == _SINGLE or _SHARD.fullmatch(name) for name in found):
        found = [name for name in found if not _VARIANT.fullmatch(name)]
    if _SINGLE in found:  # transformers reads this first
        found = [name for name in found if not _SHARD.fullmatch(name)]
    sets: dict[str, dict[str, list[str]]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, found)):
        sets.setdefault(match[1], {}).setdefault(match[2], []).append(match[0])
    for stem, by_total in sets.items():
        left_over = _outside_complete_set(folder, stem, by_total)
        found = [name for name in found if name not in left_over]
    return found


def _outside_complete_set(folder: Path, stem: str, by_total: dict[str, list[str]]) -> set[str]:
    """Return the shards ``stem``-NNNNN-of-<total> outside the one complete set.

    Args:
        folder: the folder, for messages.
        stem: the common beginning of the names.
        by_total: the names, by their <total>.

    Raises:
        CheckpointError: no set is complete, or several are.
    """
    missing = {}
    for total, present in by_total.items():
        wanted = [
            f"{stem}-{number:05d}-of-{total}.safetensors" for number in range(1, min(int(total), _MOST_SHARDS) + 1)
        ]
        missing[total] = [name for name in wanted if name not in present]
    complete = [total for total, names in missing.items() if not names]
    if len(complete) > 1:
        listed = " and ".join(f"{stem}-*-of-{total}" for total in complete)
        raise CheckpointError(f"{folder}: {len(complete)} sets of weights, {listed}; keep one", code="several_sets")
    if not complete:
        fullest = max(by_total, key=lambda total: len(by_total[total]))
        _refuse_missing(folder, missing[fullest], int(fullest))
    return {name for total, names in by_total.items() if total not in complete for name in names}


def _refuse_missing(folder: Path, missing: Sequence[str], total: int) -> None:
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {total} shards missing, the first is {missing[0]}; "
            "finish the download (hf download)",
            code="missing_shards",
        )


def _listed(index: Path) -> dict[str, set[str]]:
    """Return the shards that ``index`` lists, each with its tensors."""
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
    return shards
