"""The plan of an unfinished pack: its source and settings, kept beside it so that a later run can continue.

The state folder holds the plan and a marker for each finished unit of work.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashmoe_mlx.checkpoint.checkpoint import Checkpoint, read_config
from flashmoe_mlx.checkpoint.tensors import classify_tensors
from flashmoe_mlx.errors import CheckpointError, InputError, PackError
from flashmoe_mlx.formats.files import write_atomically
from flashmoe_mlx.formats.safetensors_header import TensorInfo
from flashmoe_mlx.formats.shares import Share, parse_shard
from flashmoe_mlx.formats.untrusted import read_object, same_json
from flashmoe_mlx.models.config import ModelConfig

_DOWNLOADS = ".download"
"""The folder in an unfinished pack for shards from the hub."""
_STATE = ".packing"
_PLAN = "plan.json"
_VERSION = 2
_OF_SYSTEMS = ("lost+found", "Thumbs.db", "desktop.ini", "System Volume Information")


@dataclass(frozen=True, slots=True)
class PackSettings:
    """Settings of a pack.

    Attributes:
        bits: the widths of each variant; see ``widths.Width``.
        group_size: the number of weights that share a scale and a bias.
        resident_bits: the width of resident matrices that the checkpoint has dense; None to keep these dense.
        quantiser: chooses scales and biases of routed experts; None for the default of each width.
        shard: the share whose experts are packed, such as "1/2"; None for all experts.
        weights: the weights of all nodes, with ``shard``; None for equal weights.
    """

    bits: tuple[int | str, ...]
    group_size: int
    resident_bits: int | None
    quantiser: str | None = None
    shard: str | None = None
    weights: tuple[float, ...] | None = None

    @property
    def share(self) -> Share | None:
        """The share whose experts are packed; None for all experts."""
        return None if self.shard is None else parse_shard(self.shard, self.weights)


def state_folder(out: Path) -> Path:
    """Return the folder of the plan and the markers of the unfinished pack in ``out``."""
    return out / _STATE


def downloads_folder(out: Path) -> Path:
    """Return the folder for shards from the hub that the pack in ``out`` still needs."""
    return out / _DOWNLOADS


def forget_plan(out: Path) -> None:
    """Remove the files that only an unfinished pack needs."""
    for name in (_STATE, _DOWNLOADS):
        shutil.rmtree(out / name, ignore_errors=True)


def begin_or_resume(
    source: Path | Checkpoint, out: Path, settings: PackSettings, ignored: Callable[[Path], bool] | None = None
) -> Checkpoint:
    """Open the checkpoint to pack into ``out``; a resumed run needs only shards that are not packed yet.

    Args:
        source: the checkpoint, or its folder.
        out: the folder of the pack.
        settings: the settings of the pack.
        ignored: returns whether a path in ``out`` may be there before packing begins.

    Raises:
        CheckpointError: the source is not supported, or has changed since packing began.
        PackError: ``out`` holds other files, or was begun with another source or other settings.
    """
    folder = source.folder if isinstance(source, Checkpoint) else source
    if folder.resolve() == out.resolve():
        raise PackError(f"{out}: out= must not be the checkpoint's own folder", code="contradiction")
    # Operating systems leave hidden files and the files in _OF_SYSTEMS in every folder that a user opens.
    inside = [path for path in out.iterdir() if not path.name.startswith(".") and path.name not in _OF_SYSTEMS]
    present = [path.name for path in inside if ignored is None or not ignored(path)]
    if not present:
        return _begin(source, out, settings)
    if not (state_folder(out) / _PLAN).is_file():
        raise PackError(
            f"{out}: not empty (it holds {min(present)}), and not a pack begun by this tool", code="folder_not_empty"
        )
    plan = _read_plan(out)
    if plan is None:
        raise PackError(
            f"{out}: begun by another version of this tool; delete it, or finish it with that version",
            code="unsupported_pack_version",
        )
    if plan["source"] != str(folder.resolve()):
        raise PackError(
            f"{out}: holds an unfinished pack of {plan['source']}; delete it or choose another out=",
            code="another_plan",
        )
    if plan["settings"] != _listed(settings):
        raise PackError(
            f"{out}: this pack was begun with {_shown(plan['settings'])}; repeat these, or delete it",
            code="another_plan",
        )
    return _resume(source, out, plan)


def resume_or_restart(source: Path | Checkpoint, out: Path, settings: PackSettings) -> Checkpoint:
    """Open the checkpoint from which to extend the finished pack in ``out``; drop another unfinished extension."""
    folder = source.folder if isinstance(source, Checkpoint) else source
    plan = _read_plan(out)
    if plan is not None and (plan["source"], plan["settings"]) == (str(folder.resolve()), _listed(settings)):
        with contextlib.suppress(InputError):
            return _resume(source, out, plan)
    return _begin(source, out, settings)


def restart_unless_same(out: Path, settings: PackSettings) -> None:
    """Continue to extend the finished pack in ``out`` from its own experts; drop another unfinished extension."""
    plan = _read_plan(out)
    if plan is None or (plan["source"], plan["settings"]) != (str(out.resolve()), _listed(settings)):
        _write_plan(out, out, settings, {})


def refuse_if_changed(checkpoint: Checkpoint, out: Path) -> None:
    """Raise CheckpointError if a shard has changed since packing into ``out`` began."""
    plan = _read_plan(out) or {}
    for shard, stamp in checkpoint.stamps().items():
        if plan["stamps"].get(shard) != stamp:
            raise CheckpointError(
                f"{checkpoint.folder / shard}: changed since packing began; delete {out} and pack again",
                code="source_changed",
            )


def _begin(source: Path | Checkpoint, out: Path, settings: PackSettings) -> Checkpoint:
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    if isinstance(checkpoint.config, ModelConfig):
        classify_tensors(checkpoint)  # a checkpoint that cannot be packed leaves no plan
    index = {
        "identity": checkpoint.identity,
        "config": checkpoint.published,
        "tensors": {name: list(asdict(tensor).values()) for name, tensor in checkpoint.tensors.items()},
        "stamps": checkpoint.stamps(),
    }
    _write_plan(out, checkpoint.folder, settings, index)
    return checkpoint


def _write_plan(out: Path, source: Path, settings: PackSettings, index: Mapping[str, Any]) -> None:
    state = state_folder(out)
    shutil.rmtree(state, ignore_errors=True)  # it may hold markers of another plan
    state.mkdir()
    plan = {"version": _VERSION, "source": str(source.resolve()), "settings": _listed(settings), **index}
    write_atomically(state / _PLAN, json.dumps(plan).encode())


def _read_plan(out: Path) -> dict[str, Any] | None:
    """Return the plan, or None if it has another version."""
    plan = read_object(state_folder(out) / _PLAN)
    return plan if plan.get("version") == _VERSION else None


def _resume(source: Path | Checkpoint, out: Path, plan: Mapping[str, Any]) -> Checkpoint:
    if isinstance(source, Checkpoint):
        checkpoint = source
    else:
        places = {
            name: (shard, dtype, tuple(shape), *place)
            for name, (shard, dtype, shape, *place) in plan["tensors"].items()
        }
        checkpoint = Checkpoint(
            source, read_config(source), {name: TensorInfo(*place) for name, place in places.items()}
        )
    if checkpoint.identity != plan["identity"]:
        began, now = (" at ".join(identity.values()) for identity in (plan["identity"], checkpoint.identity))
        raise PackError(
            f"{out}: this pack was begun from {began}, not {now}; repeat with revision=, or delete it",
            code="another_plan",
        )
    if not same_json(checkpoint.published, plan["config"]):
        raise CheckpointError(
            f"{checkpoint.folder}: config.json changed since packing began; delete {out} and pack again",
            code="source_changed",
        )
    refuse_if_changed(checkpoint, out)
    return checkpoint


def _listed(settings: PackSettings) -> dict[str, Any]:
    """Return the settings in the form in which JSON returns them."""
    listed = {**asdict(settings), "bits": list(settings.bits), "weights": settings.weights and list(settings.weights)}
    return {key: value for key, value in listed.items() if value is not None or key not in ("shard", "weights")}


def _shown(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={'null' if value is None else value}" for key, value in settings.items())
