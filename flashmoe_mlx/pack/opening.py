"""Open a pack and check it.

A pack is untrusted until ``open_pack`` has checked it: nothing is allocated or read by its numbers before that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmoe_mlx.errors import CheckpointError, PackError
from flashmoe_mlx.formats.files import regular_file_size
from flashmoe_mlx.formats.manifest import (
    CHECKSUMS,
    FORMAT,
    FORMAT_VERSION,
    HASH_BYTES,
    MANIFEST,
    RESIDENT,
    TEXT_FILES,
    PackedExperts,
    file_hash,
    layer_file,
    variant_directory,
)
from flashmoe_mlx.formats.record import DTYPE_BYTES, RecordLayout
from flashmoe_mlx.formats.safetensors_header import read_header
from flashmoe_mlx.formats.untrusted import read_object, same_json
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.pack.manifest import geometry_of, variant_name
from flashmoe_mlx.pack.quantize import QUANTIZERS

_SMALL = 64 * 2**20
"""Files up to this size are hashed whenever a pack is opened, larger ones only by ``verify``."""

_LINK = (
    "is a symbolic link, and links are not followed: a pack must hold its own files; copy it with cp -rL, or download "
    "it with hf download --local-dir"
)


@dataclass(frozen=True)
class Pack:
    """A checked pack; ``experts`` by variant."""

    folder: Path
    manifest: Mapping[str, Any]
    config: ModelConfig
    experts: Mapping[str, PackedExperts]

    @property
    def resident_path(self) -> Path:
        """The resident weights."""
        return self.folder / RESIDENT

    @property
    def nbytes(self) -> int:
        """Size of all its files but the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())


def open_pack(folder: Path) -> Pack:
    """Check the pack in ``folder`` against its manifest: every file is there, regular, of the right size, small ones
    unchanged.

    Raises:
        InputError: the pack is incomplete, damaged or foreign; mostly a PackError.
    """
    try:
        folder = folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links (before Python 3.13), a NUL in the name
        raise PackError(f"{str(folder)!r}: {error}") from error
    if (folder / MANIFEST).is_symlink():
        raise PackError(f"{folder}: {MANIFEST} {_LINK}", code="symbolic_link")
    if regular_file_size(folder / MANIFEST) is None:
        raise PackError(
            f"{folder}: no {MANIFEST} here: not a pack, or not finished (run the same task=pack command again)",
            code="no_pack",
        )
    return _Opener(folder).open()


class _Opener:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        manifest = read_object(folder / MANIFEST, strict=True)
        if manifest.get("format") != FORMAT:
            raise self._refuse(f"{MANIFEST} is not the manifest of a pack")
        version = manifest.get("format_version")
        if version != FORMAT_VERSION or type(version) is not int:
            raise self._refuse(
                f"format version {version!r} is not supported, only {FORMAT_VERSION}; delete the pack and make it again"
            )
        self._manifest = manifest
        self._files = self._object(manifest.get("files"), "files")
        self._known: set[str] = set()

    def _refuse(self, what: str, code: str | None = None) -> PackError:
        return PackError(f"{self._folder}: {what}", code=code)

    def _object(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._refuse(f"{MANIFEST}: {what} is not an object")
        return value

    def open(self) -> Pack:
        self._check_origin()
        self._check_file("config.json")
        try:
            config = ModelConfig.from_json(read_object(self._folder / "config.json"))
        except CheckpointError as error:
            raise self._refuse(str(error)) from None
        if not same_json(self._manifest.get("geometry"), geometry_of(config)):
            raise self._refuse(
                f"the geometry in {MANIFEST} is not that of config.json: files of different models are mixed"
            )
        variants = self._object(self._manifest.get("variants"), "variants")
        if not variants:
            raise self._refuse(f"{MANIFEST} lists no variants")
        experts = {name: self._variant(name, entry, config) for name, entry in variants.items()}
        for name in TEXT_FILES:
            if name in self._files:
                self._check_file(name)
        self._check_resident()
        foreign = self._files.keys() - self._known
        if foreign:
            raise self._refuse(f"{MANIFEST} lists {min(foreign)!r}, which is no part of such a pack")
        return Pack(self._folder, self._manifest, config, experts)

    def _check_origin(self) -> None:
        source = self._object(self._manifest.get("source"), "source")
        skipped = self._manifest.get("skipped_tensors")
        if not isinstance(skipped, list) or not all(isinstance(text, str) for text in (*source.values(), *skipped)):
            raise self._refuse(f"{MANIFEST}: source or skipped_tensors does not hold texts")

    def _check_file(self, name: str, nbytes: int | None = None, hashed: bool = True) -> None:
        """Check a file whose size is ``nbytes`` if that is known, and of which the manifest has a hash if ``hashed``.

        ``name`` is ours, so the manifest has no say in which paths are touched.
        """
        if name not in self._files:
            raise self._refuse(f"{MANIFEST} does not list {name}")
        self._known.add(name)
        entry = self._object(self._files[name], f"the entry of {name}")
        listed = entry.get("bytes")
        if type(listed) is not int or listed < 0:
            raise self._refuse(f"{MANIFEST}: the size of {name} is {listed!r}")
        if entry.keys() - {"bytes"} != ({"xxh3"} if hashed else set()):
            raise self._refuse(f"{MANIFEST}: the entry of {name} {'lacks its xxh3' if hashed else 'has foreign keys'}")
        if nbytes not in (None, listed):
            raise self._refuse(f"{name} must have {nbytes} bytes by the model's geometry, {MANIFEST} says {listed}")
        path = self._folder / name
        size = regular_file_size(path)
        if path.parent != self._folder and path.parent.is_symlink():
            raise self._refuse(f"{path.parent.name} {_LINK}", "symbolic_link")
        if path.is_symlink():
            raise self._refuse(f"{name} {_LINK}", "symbolic_link")
        if size is None:
            raise self._refuse(
                f"{name} is missing or not a regular file; delete the pack and make it again", "missing_file"
            )
        if size != listed:
            raise self._refuse(
                f"{name} has {size} bytes, {MANIFEST} says {listed}: truncated or foreign; "
                "delete the pack and make it again"
            )
        if hashed and size <= _SMALL and self._hash(path) != entry["xxh3"]:
            raise self._refuse(
                f"{name} is damaged (its checksum differs from {MANIFEST}); delete the pack and make it again"
            )

    def _hash(self, path: Path) -> str:
        try:
            return file_hash(path)
        except OSError as error:
            raise self._refuse(f"{path.name} cannot be read ({error.strerror})") from error

    def _check_resident(self) -> None:
        self._check_file(RESIDENT)
        try:
            tensors, _ = read_header(self._folder / RESIDENT)
        except CheckpointError as error:
            raise PackError(f"{error}; delete the pack and make it again") from None
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPE_BYTES:
                raise self._refuse(f"{RESIDENT}: {name} has type {tensor.dtype}, which no resident weight has")

    def _variant(self, name: str, entry: Any, config: ModelConfig) -> PackedExperts:
        entry = dict(self._object(entry, f"variant {name!r}"))
        quantiser = entry.pop("quantiser", None)
        if quantiser is not None and quantiser not in tuple(QUANTIZERS):
            raise self._refuse(f"{MANIFEST}: variant {name!r} was made by {quantiser!r}, which is not known here")
        bits, group_size, dtype = (entry.get(key) for key in ("bits", "group_size", "dtype"))
        if type(bits) is not int or type(group_size) is not int or not isinstance(dtype, str):
            raise self._refuse(f"{MANIFEST}: variant {name!r} lacks bits, group_size or dtype")
        if name not in (variant_name(bits), variant_name(bits, quantiser)):
            raise self._refuse(f"{MANIFEST}: variant {name!r} says that it has {bits} bits")
        try:
            layout = RecordLayout(config.hidden_size, config.expert_size, bits, group_size, dtype)
        except PackError as error:
            raise self._refuse(f"variant {name}: {error}") from None
        if not same_json(layout.to_json(), entry):
            raise self._refuse(
                f"{MANIFEST}: the record layout of variant {name} is not the one that its geometry gives"
            )
        directory = variant_directory(name)
        experts = PackedExperts(self._folder / directory, layout, config.num_layers, config.num_experts, quantiser)
        for layer in range(config.num_layers):
            self._check_file(f"{directory}/{layer_file(layer)}", experts.layer_bytes, hashed=False)
        self._check_file(f"{directory}/{CHECKSUMS}", config.num_layers * config.num_experts * HASH_BYTES)
        return experts
