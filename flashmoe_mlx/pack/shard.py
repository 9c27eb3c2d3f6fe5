"""Copy the share of one of several nodes out of a pack with all experts."""

from pathlib import Path

import numpy as np

from flashmoe_mlx.adapters.config import AdaptedConfig
from flashmoe_mlx.errors import InputError, PackError
from flashmoe_mlx.formats.files import publish, regular_file_size, write_atomically
from flashmoe_mlx.formats.folders import check_free_space, explain_write_errors, lock_folder
from flashmoe_mlx.formats.manifest import CHECKSUMS, MANIFEST, RESIDENT, TEXT_FILES, PackedExperts
from flashmoe_mlx.formats.shares import Share
from flashmoe_mlx.pack.layer_file import write_layer_file
from flashmoe_mlx.pack.manifest import write_manifest
from flashmoe_mlx.pack.opening import Pack, open_pack
from flashmoe_mlx.pack.progress import Progress, Silent
from flashmoe_mlx.pack.verify import read_checksums

_BLOCK = 16 * 2**20


def copy_share(pack: Pack, folder: Path, share: Share, progress: Progress | None = None) -> Pack:
    """Copy the resident weights of ``pack``, and the experts of ``share`` in all variants, to ``folder``.

    An interrupted copy is continued by the next call. Every record is compared with its checksum.

    Raises:
        InputError: the model runs through another package; code "unsupported_on_nodes".
        PackError: ``pack`` or ``folder`` holds another share (code "another_share"), ``folder`` is not empty
            ("folder_not_empty"), a record of ``pack`` is damaged ("damaged_file"), or there is too little space.
        FlashMoeError: a file cannot be read or written.
    """
    progress = progress or Silent()
    if isinstance(pack.config, AdaptedConfig):
        raise InputError("several nodes cannot run a model of another package", code="unsupported_on_nodes")
    if pack.share is not None:
        raise PackError(
            f"{pack.folder}: holds {pack.share}; shard= needs a pack with all experts", code="another_share"
        )
    if folder.resolve() == pack.folder:
        raise PackError(f"{folder}: out= must not be the folder of the pack itself", code="contradiction")
    copies = [
        (own, PackedExperts(folder / own.directory.name, own.layout, own.num_experts, own.quantizer, share))
        for own in pack.experts.values()
    ]
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder):
            if (folder / MANIFEST).exists():
                there = open_pack(folder)
                refuse_other_share(there, share)
                if there.manifest["files"][RESIDENT] != pack.manifest["files"][RESIDENT]:
                    raise PackError(f"{folder}: holds another model; choose another out=", code="another_model")
            known = {RESIDENT, "config.json", *TEXT_FILES, *(copy.directory.name for _, copy in copies)}
            inside = {path.name.removesuffix(".partial") for path in folder.iterdir() if not path.name.startswith(".")}
            if inside - known - {MANIFEST}:
                raise PackError(
                    f"{folder}: not empty (it holds {min(inside - known)}), and not a pack of this model",
                    code="folder_not_empty",
                )
            layers = [(own, copy, layer) for own, copy in copies for layer in range(own.num_layers)]
            missing = [
                one for one in layers if regular_file_size(one[1].layer_path(one[2])) != one[1].layer_bytes(one[2])
            ]
            size = sum(copy.layer_bytes(layer) for _, copy, layer in missing) + pack.resident_path.stat().st_size
            check_free_space(folder, size, "make room or choose another out=")
            progress.stage(f"copying to {folder}", size)
            for own, copy, layer in missing:
                copy.directory.mkdir(exist_ok=True)
                _copy_layer(own, copy, layer, progress)
            for own, copy in copies:
                kept = [np.array(row, "<u8")[copy.packed_in(layer)] for layer, row in enumerate(read_checksums(own))]
                write_atomically(copy.directory / CHECKSUMS, np.concatenate(kept).tobytes())
            _copy_files(pack, folder, progress)
            layouts = {name: own.layout for name, own in pack.experts.items()}
            quantizers = {name: own.quantizer for name, own in pack.experts.items()}
            source, skipped = pack.manifest["source"], pack.manifest["skipped_tensors"]
            errors = pack.manifest.get("requantization_error", {})
            write_manifest(folder, pack.config, layouts, source, skipped, quantizers, errors, share)
            return open_pack(folder)


def refuse_other_share(pack: Pack, share: Share | None) -> None:
    """Raise PackError, code "another_share", unless ``pack`` holds the experts of ``share``; None stands for all."""
    own, sizes = pack.share, (pack.config.num_moe_layers, pack.config.num_experts)
    if (own is None) != (share is None) or (own is not None and share is not None and not own.owns_as(share, *sizes)):
        raise PackError(
            f"{pack.folder}: holds {own or 'all experts'}; give the same shard= and weights=, or choose another out=",
            code="another_share",
        )


def _copy_layer(own: PackedExperts, copy: PackedExperts, layer: int, progress: Progress) -> None:
    held, expected, size = copy.packed_in(layer), read_checksums(own)[layer], own.layout[layer].record_bytes
    records = (memoryview(own.payload(layer, expert)) for expert in held)
    path = copy.layer_path(layer)
    for expert, report in zip(held, write_layer_file(path, records, own.layout[layer]), strict=True):
        if report.fault is not None or report.digest != expected[expert]:
            path.unlink(missing_ok=True)
            raise PackError(
                f"{own.layer_path(layer)}: expert {expert} is damaged; task=pack verify=true "
                f"out={own.directory.parent} lists all damage",
                code="damaged_file",
            )
        progress.advance(size)


def _copy_files(pack: Pack, folder: Path, progress: Progress) -> None:
    for name in ("config.json", *TEXT_FILES):
        if (pack.folder / name).is_file():
            write_atomically(folder / name, (pack.folder / name).read_bytes())
    partial = folder / f"{RESIDENT}.partial"
    with pack.resident_path.open("rb") as reading, partial.open("wb") as writing:
        while block := reading.read(_BLOCK):
            writing.write(block)
            progress.advance(len(block))
    publish(partial, folder / RESIDENT)
