"""``task=pack``: convert a published checkpoint into a pack, add variants to a pack, or verify a pack."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import filesize

from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.hub import HubCheckpoint
from flashmoe_mlx.checkpoint.support import is_hub_id
from flashmoe_mlx.console.output import byte_progress, show
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.formats.manifest import MANIFEST
from flashmoe_mlx.formats.shares import parse_shard
from flashmoe_mlx.pack.mirror import mirror_pack
from flashmoe_mlx.pack.opening import Pack, open_pack
from flashmoe_mlx.pack.plan import downloads_folder
from flashmoe_mlx.pack.requantization import describe_errors
from flashmoe_mlx.pack.shard import copy_share
from flashmoe_mlx.pack.verify import verify_mirror, verify_pack
from flashmoe_mlx.pack.writer import add_variants, pack_checkpoint
from flashmoe_mlx.paths import as_argument, expand_path
from flashmoe_mlx.tasks.shared.keys import TEXT, CommonConfig
from flashmoe_mlx.tasks.shared.run_directory import holds_only_records

_log = logging.getLogger(__name__)
_MAX_SHOWN = 20


@dataclass
class Config(CommonConfig):
    """Keys of ``task=pack``."""

    source: str | None = field(default=None, metadata=TEXT)
    out: str | None = field(default=None, metadata=TEXT)
    revision: str | None = field(default=None, metadata=TEXT)
    bits: Any = None
    group_size: int = 64
    resident_bits: int | None = 4
    quantiser: str | None = None
    shard: str | None = field(default=None, metadata=TEXT)
    weights: list[float] | None = None
    packed_experts: str | None = field(default=None, metadata=TEXT)
    delete_source: bool = False
    mirror: str | None = field(default=None, metadata=TEXT)
    verify: bool = False


def run(config: Config, run_dir: Path) -> None:  # noqa: ARG001  # the signature of a task
    """Pack ``source`` into ``out``, or verify ``out``."""
    if config.verify:
        _refuse(
            config, ("source", "revision", "packed_experts", "delete_source", "shard"), "verify=true reads only out="
        )
        _verify(config)
        return
    pack = _make(config)
    if config.mirror is not None:
        mirror = expand_path(config.mirror)
        with byte_progress() as progress:
            mirror_pack(pack, mirror, progress)
        show(f"{mirror}: a copy of the experts; to read both: backend.mirrors=[{mirror}]")
    variants = ", ".join(sorted(pack.experts))
    _log.info("pack %s: %s, %d bytes", pack.folder, variants, pack.nbytes)
    for line in describe_errors(pack.manifest.get("requantization_error", {})):
        show(line)
    show(f"{pack.folder}: {variants}, {filesize.decimal(pack.nbytes)}")
    if pack.share is not None:
        show(f"it holds {pack.share}: start all nodes with mlx.launch, see docs/several-machines.md")
        return
    show(f"to run it: python -m flashmoe_mlx {as_argument('model.path', pack.folder)}")


def _make(config: Config) -> Pack:
    if config.source is None:
        raise InputError("task=pack needs source=<checkpoint folder, hub id or pack>")
    folder = expand_path(config.source)
    with byte_progress() as progress:
        if config.shard is None and config.weights is not None:
            raise InputError("weights= needs shard=, the part to pack", code="contradiction")
        if (folder / MANIFEST).is_file() and config.shard is not None:
            _refuse(config, ("revision", "packed_experts", "delete_source", "bits"), f"source={folder} is a pack")
            if config.out is None:
                raise InputError("shard= needs out=<folder for the share>")
            share = parse_shard(config.shard, config.weights)
            return copy_share(open_pack(folder), expand_path(config.out), share, progress)
        if (folder / MANIFEST).is_file():
            if config.out is not None and expand_path(config.out).resolve() != folder.resolve():
                raise InputError(f"source={folder} is a pack, and variants are added in place; remove out=")
            _refuse(config, ("revision", "packed_experts", "delete_source"), f"source={folder} is a pack")
            return add_variants(
                open_pack(folder),
                config.bits,
                group_size=config.group_size,
                quantiser=config.quantiser,
                progress=progress,
            )
        if config.out is None:
            raise InputError("task=pack needs out=<folder for the pack>")
        out = expand_path(config.out)
        source: Path | Checkpoint = folder
        if folder.exists():
            _refuse(config, ("revision",), f"source={folder} is a folder")
        else:
            if not is_hub_id(config.source):
                raise InputError(f"source={config.source}: neither a folder nor a hub id (<org>/<name>)")
            source = HubCheckpoint.open_remote(config.source, config.revision, downloads_folder(out))
        return pack_checkpoint(
            source,
            out,
            config.bits,
            group_size=config.group_size,
            resident_bits=config.resident_bits,
            quantiser=config.quantiser,
            shard=config.shard,
            weights=config.weights,
            packed_experts=None if config.packed_experts is None else expand_path(config.packed_experts),
            # Shards downloaded only for packing are not needed afterwards.
            delete_source=config.delete_source or isinstance(source, HubCheckpoint),
            progress=progress,
            ignored=holds_only_records,  # the record of this run may lie below out=
        )


def _refuse(config: Config, keys: Sequence[str], reason: str) -> None:
    """Refuse keys that would be ignored."""
    for key in keys:
        if getattr(config, key):
            raise InputError(f"{key}={getattr(config, key)}: has no effect: {reason}", code="contradiction")


def _verify(config: Config) -> None:
    if config.out is None:
        raise InputError("verify=true needs out=<folder of the pack>")
    pack = open_pack(expand_path(config.out))
    with byte_progress() as progress:
        damages = verify_pack(pack, progress)
        of_pack = len(damages)
        if config.mirror is not None:
            damages += verify_mirror(pack, expand_path(config.mirror), progress)
    for damage in damages[:_MAX_SHOWN]:
        show(str(damage))
    if damages:
        count = "1 part is" if len(damages) == 1 else f"{len(damages)} parts are"
        remedy = (
            "delete the pack and make it again"
            if of_pack
            else f"delete the damaged files, and copy them again: task=pack source={pack.folder} mirror={config.mirror}"
        )
        raise FlashMoeError(f"{pack.folder if of_pack else config.mirror}: {count} damaged, as listed above; {remedy}")
    show(f"{pack.folder}: verified, every byte is intact")
