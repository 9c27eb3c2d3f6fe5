"""Opening of a pack, which is untrusted until ``open_pack`` has checked it.

Before that, nothing is allocated or read by the numbers of its files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmoe_mlx.adapters.records import read_layout
from flashmoe_mlx.checkpoint.support import read_sizes
from flashmoe_mlx.errors import CheckpointError, InputError, PackError
from flashmoe_mlx.formats.files import regular_file_size
from flashmoe_mlx.formats.manifest import (
    CHECKSUMS,
    FORMAT,
    FORMAT_VERSION,
    HASH_BYTES,
    MANIFEST,
    MIXED_FORMAT_VERSION,
    RESIDENT,
    SHARE_FORMAT_VERSION,
    TEXT_FILES,
    PackedExperts,
    layer_file,
    variant_directory,
)
from flashmoe_mlx.formats.record import AFFINE, DTYPE_BYTES, PROJECTIONS, LayerLayouts, MatrixFormat, RecordLayout
from flashmoe_mlx.formats.safetensors_header import read_header
from flashmoe_mlx.formats.shares import Share
from flashmoe_mlx.formats.untrusted import read_object, same_json
from flashmoe_mlx.models.config import ModelConfig, ModelSize
from flashmoe_mlx.models.registry import family_of
from flashmoe_mlx.pack.listed_files import LINK_ADVICE, ListedFiles
from flashmoe_mlx.pack.manifest import geometry_of, layout_entry, layout_name, version_of
from flashmoe_mlx.pack.quantize import BY_WIDTH, QUANTIZERS


@dataclass(frozen=True)
class Pack:
    """A checked pack.

    Attributes:
        folder: the folder of the pack.
        manifest: the content of its manifest.
        config: the configuration of the model.
        experts: the records of each variant.
        share: the share whose experts it holds; None for all experts.
    """

    folder: Path
    manifest: Mapping[str, Any]
    config: ModelSize
    experts: Mapping[str, PackedExperts]
    share: Share | None = None

    @property
    def resident_path(self) -> Path:
        """Path of the resident weights."""
        return self.folder / RESIDENT

    @property
    def nbytes(self) -> int:
        """Size of all files but the manifest in bytes."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())


def open_pack(folder: Path) -> Pack:
    """Open the pack in ``folder`` after checking every file against the manifest and the geometry of the model.

    Small files are compared with their hashes; ``verify_pack`` compares all others.

    Raises:
        InputError: the pack is missing, incomplete, damaged, or in another format. In most cases this is a PackError
            with a specific code: "no_pack", "symbolic_link", "invalid_manifest", "unsupported_pack_version",
            "mixed_models", or a code of ``ListedFiles.check``.
    """
    folder = _resolve(folder)
    manifest = _read_manifest(folder)
    files = ListedFiles(folder, manifest["files"])
    config = _read_config(folder, manifest, files)
    share = _read_share(folder, manifest)
    variants = manifest["variants"].items()
    experts = {name: _open_variant(folder, name, entry, config, files, share) for name, entry in variants}
    version = version_of((own.layout for own in experts.values()), share)
    if manifest["format_version"] != version:
        raise PackError(
            f"{folder}: format version {manifest['format_version']} is not supported with these variants, only "
            f"{version}; delete the pack and make it again",
            code="unsupported_pack_version",
        )
    for name in TEXT_FILES:
        if name in files:
            files.check(name)
    files.check(RESIDENT)
    if isinstance(config, ModelConfig):
        _check_resident(folder, family_of(config).tensor_names.kept)
    files.refuse_unknown()
    return Pack(folder, manifest, config, experts, share)


def _resolve(folder: Path) -> Path:
    try:
        folder = folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links (before Python 3.13), a NUL in the name
        raise PackError(f"{str(folder)!r}: {error}", code="no_pack") from error
    if (folder / MANIFEST).is_symlink():
        raise PackError(f"{folder}: {MANIFEST} {LINK_ADVICE}", code="symbolic_link")
    if regular_file_size(folder / MANIFEST) is None:
        raise PackError(
            f"{folder}: no {MANIFEST} here: not a pack, or an unfinished one (run the same task=pack command again)",
            code="no_pack",
        )
    return folder


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest and check its format, version, and types, except for the entries of variants and files."""
    manifest = read_object(folder / MANIFEST, strict=True)
    if manifest.get("format") != FORMAT:
        raise _invalid(folder, "this is not the manifest of a pack")
    version = manifest.get("format_version")
    if type(version) is not int or version not in (FORMAT_VERSION, MIXED_FORMAT_VERSION, SHARE_FORMAT_VERSION):
        raise PackError(
            f"{folder}: format version {version!r} is not supported, only {FORMAT_VERSION} to {SHARE_FORMAT_VERSION}; "
            "delete the pack and make it again",
            code="unsupported_pack_version",
        )
    for name in ("files", "source", "variants"):
        if not isinstance(manifest.get(name), dict):
            raise _invalid(folder, f"{name} is not an object")
    skipped = manifest.get("skipped_tensors")
    source = manifest["source"].values()
    if not isinstance(skipped, list) or not all(isinstance(text, str) for text in (*source, *skipped)):
        raise _invalid(folder, "source or skipped_tensors does not hold strings")
    if not manifest["variants"]:
        raise _invalid(folder, "there are no variants")
    return manifest


def _read_config(folder: Path, manifest: Mapping[str, Any], files: ListedFiles) -> ModelSize:
    files.check("config.json")
    try:
        config = read_sizes(read_object(folder / "config.json"))
    except CheckpointError as error:
        raise PackError(f"{folder}: {error}", code=error.code) from None
    if not same_json(manifest.get("geometry"), geometry_of(config)):
        raise PackError(
            f"{folder}: the geometry in {MANIFEST} is not that of config.json: files of different models are mixed",
            code="mixed_models",
        )
    return config


def _read_share(folder: Path, manifest: Mapping[str, Any]) -> Share | None:
    if manifest["format_version"] != SHARE_FORMAT_VERSION:
        return None
    stated = manifest.get("share")
    entry = stated if isinstance(stated, dict) else {}
    node, weights = entry.get("node"), entry.get("weights")
    try:
        share = Share(node, tuple(weights)) if type(node) is int and isinstance(weights, list) else None
    except InputError:
        share = None
    if share is None or not 0 <= share.node < share.nodes:
        raise _invalid(folder, f"share is {stated!r}, which names no node")
    return share


def _open_variant(
    folder: Path, name: str, entry: Any, config: ModelSize, files: ListedFiles, share: Share | None
) -> PackedExperts:
    """Check the entry of a variant in the manifest, and its files."""
    if not isinstance(entry, dict):
        raise _invalid(folder, f"variant {name!r} is not an object")
    stated = dict(entry)
    quantizer = stated.pop("quantiser", None)
    if quantizer is not None and quantizer not in (*QUANTIZERS, BY_WIDTH):
        raise _invalid(folder, f"variant {name!r} has the unknown quantiser {quantizer!r}")
    layout = _layouts(folder, name, stated, config)
    if name not in (layout_name(layout), layout_name(layout, quantizer)):
        raise _invalid(folder, f"variant {name!r} has {layout.code_bits:g} bits, which contradicts its name")
    if not same_json(layout_entry(layout), stated):
        raise _invalid(folder, f"the record layout of variant {name} does not follow from its geometry")
    directory = variant_directory(name)
    experts = PackedExperts(folder / directory, layout, config.num_experts, quantizer, share)
    for layer in range(experts.num_layers):
        files.check(f"{directory}/{layer_file(layer)}", experts.layer_bytes(layer), hashed=False)
    files.check(
        f"{directory}/{CHECKSUMS}",
        sum(len(experts.packed_in(layer)) for layer in range(experts.num_layers)) * HASH_BYTES,
    )
    return experts


def _layouts(folder: Path, name: str, entry: Mapping[str, Any], config: ModelSize) -> LayerLayouts:
    """Return the record layout of each layer, which follow from the entry of a variant and the model's configuration.

    The caller compares them with the entry.
    """
    if "layers" not in entry:
        return LayerLayouts.uniform(_layout(folder, name, entry, config), config.num_moe_layers)
    stated, numbers = entry.get("layouts"), entry["layers"]
    if not isinstance(stated, list) or not all(isinstance(own, dict) for own in stated):
        raise _invalid(folder, f"variant {name!r} has no list of layouts")
    if not isinstance(numbers, list) or len(numbers) != config.num_moe_layers:
        raise _invalid(folder, f"variant {name!r} does not name a layout for each layer")
    if any(type(number) is not int or not 0 <= number < len(stated) for number in numbers):
        raise _invalid(folder, f"variant {name!r} names a layout that it does not have")
    known = [_layout(folder, name, own, config) for own in stated]
    return LayerLayouts.of(known[number] for number in numbers)


def _layout(folder: Path, name: str, entry: Mapping[str, Any], config: ModelSize) -> RecordLayout:
    """Return one record layout of a variant."""
    if not isinstance(config, ModelConfig):
        try:
            return read_layout(entry, config.hidden_size, config.expert_size)
        except PackError as error:
            raise _invalid(folder, f"variant {name!r}: {error}") from None
    stated = [entry[projection] for projection in PROJECTIONS] if set(PROJECTIONS) <= entry.keys() else [entry] * 3
    try:
        formats = [_format(folder, name, own) for own in stated]
        return RecordLayout(config.hidden_size, config.expert_size, *formats)
    except PackError as error:
        if error.code == "unsupported_layout":
            raise PackError(f"{folder}: variant {name!r}: {error}", code=error.code) from None
        raise


def _format(folder: Path, name: str, entry: Any) -> MatrixFormat:
    stated = entry if isinstance(entry, dict) else {}
    bits, group_size, dtype, mode = (stated.get(key) for key in ("bits", "group_size", "dtype", "mode"))
    if type(bits) is not int or type(group_size) is not int or not isinstance(dtype, str):
        raise _invalid(folder, f"variant {name!r} lacks bits, group_size, or dtype")
    return MatrixFormat(bits, group_size, dtype, mode if isinstance(mode, str) else AFFINE)


def _check_resident(folder: Path, kept: re.Pattern[str] | None) -> None:
    """Check the header of the resident weights; tensors whose names match ``kept`` are not weights."""
    try:
        tensors, _ = read_header(folder / RESIDENT)
    except CheckpointError as error:
        raise PackError(f"{error}; delete the pack and make it again", code="damaged_file") from None
    for name, tensor in tensors.items():
        if kept is not None and kept.search(name):
            continue
        if tensor.dtype not in DTYPE_BYTES or tensor.dtype == "U8":
            raise PackError(
                f"{folder}: {RESIDENT}: {name} has type {tensor.dtype}, which no resident weight has",
                code="unsupported_tensor_type",
            )


def _invalid(folder: Path, fault: str) -> PackError:
    return PackError(f"{folder}: {MANIFEST}: {fault}", code="invalid_manifest")
