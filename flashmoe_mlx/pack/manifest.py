"""Write the manifest of a pack; ``formats/manifest.py`` describes its content."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flashmoe_mlx.formats.files import write_atomically
from flashmoe_mlx.formats.manifest import (
    CHECKSUMS,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    RESIDENT,
    TEXT_FILES,
    file_hash,
    layer_file,
    variant_directory,
)
from flashmoe_mlx.formats.record import RecordLayout
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.pack.quantize import default_quantizer


def variant_name(bits: int, quantiser: str | None = None) -> str:
    """Return the name of the variant with experts of ``bits`` bits, made by ``quantiser``."""
    return f"q{bits}" if quantiser in (None, default_quantizer(bits)) else f"q{bits}-{quantiser}"


def geometry_of(config: ModelConfig) -> dict[str, int]:
    """Return the sizes that determine where every record lies."""
    return {
        "num_layers": config.num_layers,
        "num_experts": config.num_experts,
        "hidden_size": config.hidden_size,
        "expert_size": config.expert_size,
    }


def write_manifest(
    folder: Path,
    config: ModelConfig,
    variants: Mapping[str, RecordLayout],
    source: Mapping[str, str],
    skipped: Sequence[str],
    quantisers: Mapping[str, str | None] = MappingProxyType({}),
) -> None:
    """Describe the finished files in ``folder``; with this it becomes a pack.

    ``quantisers`` holds the quantiser of each variant, None for copies.
    """
    files: dict[str, Any] = {}
    for name in ("config.json", *TEXT_FILES, RESIDENT):
        if (folder / name).is_file():
            files[name] = _described(folder / name)
    for variant, layout in variants.items():
        prefix = variant_directory(variant)
        layer_bytes = config.num_experts * layout.record_bytes
        files |= {f"{prefix}/{layer_file(layer)}": {"bytes": layer_bytes} for layer in range(config.num_layers)}
        files[f"{prefix}/{CHECKSUMS}"] = _described(folder / prefix / CHECKSUMS)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": dict(source),
        "geometry": geometry_of(config),
        "variants": {
            name: layout.to_json() | ({"quantiser": quantisers[name]} if quantisers.get(name) else {})
            for name, layout in variants.items()
        },
        "files": files,
        "skipped_tensors": list(skipped),
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3": file_hash(path)}
