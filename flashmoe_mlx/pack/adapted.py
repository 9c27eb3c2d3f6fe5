"""Packs of models that run through MLX-LM: its weights as it computes with them, copied."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from flashmoe_mlx.adapters.config import AdaptedConfig
from flashmoe_mlx.adapters.packing import AdaptedRecords, resident_parameters
from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.errors import CheckpointError, InputError
from flashmoe_mlx.formats.files import publish, write_atomically
from flashmoe_mlx.formats.folders import check_free_space
from flashmoe_mlx.formats.manifest import RESIDENT, TEXT_FILES
from flashmoe_mlx.pack.manifest import write_manifest
from flashmoe_mlx.pack.opening import Pack, open_pack
from flashmoe_mlx.pack.plan import PackSettings, forget_plan, refuse_if_changed, state_folder
from flashmoe_mlx.pack.progress import Progress
from flashmoe_mlx.pack.variant import VariantWriter
from flashmoe_mlx.pack.widths import DEFAULT, PUBLISHED

_POSSIBLE = PackSettings((DEFAULT,), 64, 4)
"""The settings without effect on such a pack."""


def refuse_settings(settings: PackSettings, packed_experts: Path | None) -> None:
    """Raise InputError, code "not_for_mlx_lm", if a setting would change weights, which MLX-LM's models keep."""
    stated = (
        ("bits", settings.bits, ((DEFAULT,), (PUBLISHED,))),
        ("group_size", settings.group_size, (_POSSIBLE.group_size,)),
        ("resident_bits", settings.resident_bits, (_POSSIBLE.resident_bits, None)),
        ("quantiser", settings.quantiser, (None,)),
        ("packed_experts", packed_experts, (None,)),
        ("shard", settings.shard, (None,)),
    )
    for name, value, possible in stated:
        if value not in possible:
            raise InputError(
                f"{name}: packs of models that run through mlx-lm keep the weights of the checkpoint; leave it out, "
                "or convert the checkpoint with mlx_lm.convert for other widths",
                code="not_for_mlx_lm",
            )


def pack_adapted(checkpoint: Checkpoint, out: Path, progress: Progress, delete_source: bool, remedy: str) -> Pack:
    """Write the pack of a model of MLX-LM; finished layers of an interrupted run are kept.

    Args:
        checkpoint: the checkpoint.
        out: the folder of the pack, with its plan.
        progress: shows the progress.
        delete_source: delete the shards when the pack is complete.
        remedy: the advice if the disk is too small.

    Raises:
        CheckpointError: MLX-LM refuses the checkpoint, or a weight is not finite.
        FlashMoeError: no space is left.
    """
    config = checkpoint.config
    assert isinstance(config, AdaptedConfig)
    for shard in checkpoint.shards:
        checkpoint.ensure(shard)
    records = AdaptedRecords(checkpoint.folder, config, checkpoint.tensors, checkpoint.extent)
    variant = VariantWriter(records, out, PUBLISHED, _POSSIBLE.group_size, progress)
    resident = resident_parameters(checkpoint.folder)
    nbytes = sum(array.nbytes for array in resident.values())
    check_free_space(out, variant.bytes_to_write() + nbytes, remedy)
    for layer in range(records.num_layers):
        if not variant.has_layer(layer):
            variant.write_layer(layer)
    progress.stage("resident weights", nbytes)
    _write_resident(checkpoint, resident, out)
    progress.advance(nbytes)
    refuse_if_changed(checkpoint, out)
    for name in ("config.json", *TEXT_FILES):
        if (checkpoint.folder / name).is_file():
            write_atomically(out / name, (checkpoint.folder / name).read_bytes())
    variant.finish()
    write_manifest(out, config, {variant.name: variant.layout}, checkpoint.identity, ())
    forget_plan(out)
    if delete_source:
        for shard in checkpoint.shards:
            checkpoint.discard(shard)
    return open_pack(out)


def _write_resident(checkpoint: Checkpoint, resident: dict[str, mx.array], out: Path) -> None:
    for name, array in resident.items():
        if mx.issubdtype(array.dtype, mx.floating) and not np.array(mx.isfinite(array).all()):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} holds NaN or infinity: the published model is damaged", code="not_finite"
            )
    path = state_folder(out) / RESIDENT
    mx.save_safetensors(str(path), resident, {"format": "mlx"})
    publish(path, out / RESIDENT)
