"""Writing of the manifest of a pack; ``formats/manifest.py`` documents its content."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flashmoe_mlx.formats.files import write_atomically
from flashmoe_mlx.formats.manifest import (
    CHECKSUMS,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MIXED_FORMAT_VERSION,
    RESIDENT,
    SHARE_FORMAT_VERSION,
    TEXT_FILES,
    PackedExperts,
    file_hash,
    layer_file,
    variant_directory,
)
from flashmoe_mlx.formats.record import AFFINE, LayerLayouts
from flashmoe_mlx.formats.shares import Share
from flashmoe_mlx.models.config import ModelSize
from flashmoe_mlx.pack.quantize import BY_WIDTH, default_quantizer

PUBLISHED_NAME = "published"
"""The name of the variant of a model that runs through MLX-LM."""


def variant_name(bits: int, quantizer: str | None = None) -> str:
    """Return the name of the variant with experts of ``bits`` bits; None stands for the default quantizer."""
    return f"q{bits}" if quantizer in (None, default_quantizer(bits)) else f"q{bits}-{quantizer}"


def layout_name(layout: LayerLayouts, quantizer: str | None = None) -> str:
    """Return the name of the variant with experts of this layout; see ``variant_name`` for ``quantizer``.

    Several widths have one name, by their mean: "mixed-3.33".
    """
    if not layout[0].is_native:
        return PUBLISHED_NAME
    single = layout.single_format
    if single is not None:
        assert single.bits is not None
        if single.mode != AFFINE:
            return single.mode
        return variant_name(single.bits, quantizer)
    name = f"mixed-{layout.code_bits:.2f}"
    return name if quantizer in (None, BY_WIDTH) else f"{name}-{quantizer}"


def layout_entry(layout: LayerLayouts) -> dict[str, Any]:
    """Return the layout of a variant in the form of the manifest."""
    if len(layout.distinct) == 1 and layout.single_format is not None and layout[0].is_native:
        return layout[0].to_json()
    numbers = {own: number for number, own in enumerate(layout.distinct)}
    return {"layouts": [own.to_json() for own in layout.distinct], "layers": [numbers[own] for own in layout]}


def version_of(variants: Iterable[LayerLayouts], share: Share | None) -> int:
    """Return the format version of a pack with variants of these layouts, and the experts of ``share`` or all."""
    if share is not None:
        return SHARE_FORMAT_VERSION
    known = list(variants)
    singles = [layout.single_format for layout in known]
    plain = all(single is not None and single.mode == AFFINE for single in singles)
    plain = plain and all(layout[0].is_native for layout in known)
    return FORMAT_VERSION if plain else MIXED_FORMAT_VERSION


def geometry_of(config: ModelSize) -> dict[str, int]:
    """Return the sizes that determine the place of every record, in the form of the manifest."""
    return {
        "num_layers": config.num_moe_layers,
        "num_experts": config.num_experts,
        "hidden_size": config.hidden_size,
        "expert_size": config.expert_size,
    }


def write_manifest(
    folder: Path,
    config: ModelSize,
    variants: Mapping[str, LayerLayouts],
    source: Mapping[str, str],
    skipped: Sequence[str],
    quantizers: Mapping[str, str | None] = MappingProxyType({}),
    errors: Mapping[str, Any] = MappingProxyType({}),
    share: Share | None = None,
) -> None:
    """Write the manifest of the complete files in ``folder``, which makes it a pack.

    Args:
        folder: the folder of the pack.
        config: the configuration of the model.
        variants: the record layout of each variant.
        source: the origin of the pack: its name and revision.
        skipped: the names of the tensors that were not packed.
        quantizers: the quantizer of each variant; None for copies of published records.
        errors: the relative errors of weights that were decoded from codes; see ``formats/manifest.py``.
        share: the share whose experts the files hold; None for all experts.

    Raises:
        OSError: the manifest cannot be written.
    """
    files: dict[str, Any] = {}
    for name in ("config.json", *TEXT_FILES, RESIDENT):
        if (folder / name).is_file():
            files[name] = _entry(folder / name)
    for variant, layout in variants.items():
        prefix = variant_directory(variant)
        experts = PackedExperts(folder / prefix, layout, config.num_experts, packed=share)
        for layer in range(experts.num_layers):
            files[f"{prefix}/{layer_file(layer)}"] = {"bytes": experts.layer_bytes(layer)}
        files[f"{prefix}/{CHECKSUMS}"] = _entry(folder / prefix / CHECKSUMS)
    manifest = {
        "format": FORMAT,
        "format_version": version_of(variants.values(), share),
        "source": dict(source),
        "geometry": geometry_of(config),
        "variants": {
            name: layout_entry(layout) | ({"quantiser": quantizers[name]} if quantizers.get(name) else {})
            for name, layout in variants.items()
        },
        **({} if share is None else {"share": share.to_json()}),
        "files": files,
        "skipped_tensors": list(skipped),
        **({"requantization_error": dict(errors)} if errors else {}),
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3": file_hash(path)}
