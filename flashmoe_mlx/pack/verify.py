"""Verification of every byte of a pack against its checksums."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmoe_mlx.errors import PackError
from flashmoe_mlx.formats.manifest import CHECKSUMS, PackedExperts, file_hash
from flashmoe_mlx.pack.inspection import inspect_layer
from flashmoe_mlx.pack.opening import Pack
from flashmoe_mlx.pack.progress import Progress, Silent


@dataclass(frozen=True, slots=True)
class Damage:
    """A damaged part of a pack; ``str`` gives a line for people."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def verify_pack(pack: Pack, progress: Progress | None = None) -> list[Damage]:
    """Read all of ``pack`` and return its damaged parts.

    Raises:
        PackError: a file of checksums changed since the pack was opened (code "pack_changed").
    """
    progress = progress or Silent()
    progress.stage("verifying", pack.nbytes)
    found: list[Damage] = []
    for name, entry in pack.manifest["files"].items():
        if "xxh3" in entry:
            path = pack.folder / name
            try:
                if file_hash(path) != entry["xxh3"]:
                    found.append(Damage(path, "the checksum differs"))
            except OSError as error:
                found.append(Damage(path, f"cannot be read ({error.strerror})"))
            progress.advance(entry["bytes"])
    for variant, experts in pack.experts.items():
        expected = read_checksums(experts)
        for layer in range(experts.num_layers):
            found.extend(_damaged_records(variant, experts, layer, expected[layer], progress))
    return found


def verify_mirror(pack: Pack, folder: Path, progress: Progress | None = None) -> list[Damage]:
    """Read the copies of the experts of ``pack`` in ``folder``, and return the damaged records.

    Raises:
        PackError: ``folder`` holds no copy of a layer file (code "no_mirror"), or a file of checksums changed
            ("pack_changed").
    """
    progress = progress or Silent()
    found: list[Damage] = []
    for variant, experts in pack.experts.items():
        copy = experts.copy_in(folder)
        held = [layer for layer in range(copy.num_layers) if copy.layer_path(layer).is_file()]
        if not held:
            raise PackError(f"mirror={folder}: no copy of {experts.directory} here", code="no_mirror")
        progress.stage(f"verifying {copy.directory}", sum(copy.layer_bytes(layer) for layer in held))
        expected = read_checksums(experts)
        for layer in held:
            found.extend(_damaged_records(variant, copy, layer, expected[layer], progress))
    return found


def read_checksums(experts: PackedExperts) -> list[list[int]]:
    """Return the hash of each record, by layer, in the order of the records.

    Raises:
        PackError: the file changed since the pack was opened; code "pack_changed".
    """
    path = experts.directory / CHECKSUMS
    try:
        ends = np.cumsum([len(experts.packed_in(layer)) for layer in range(experts.num_layers)])
        hashes = np.fromfile(path, "<u8")
        if len(hashes) != ends[-1]:
            raise ValueError(f"{len(hashes)} hashes")
        return [own.tolist() for own in np.split(hashes, ends[:-1])]
    except (OSError, ValueError) as error:
        raise PackError(f"{path}: changed since the pack was opened ({error})", code="pack_changed") from error


def _damaged_records(
    variant: str, experts: PackedExperts, layer: int, expected: list[int], progress: Progress
) -> Iterator[Damage]:
    path, layout, held = experts.layer_path(layer), experts.layout[layer], experts.packed_in(layer)
    try:
        for place, report in enumerate(inspect_layer(path, layout, len(held))):
            fault = report.fault
            if fault is None and report.digest != expected[place]:
                fault = "its checksum differs"
            if fault is not None:
                expert, start = held[place], place * layout.record_bytes
                yield Damage(
                    path, f"{variant} layer {layer} expert {expert} (record at byte {start}) is damaged: {fault}"
                )
            progress.advance(layout.record_bytes)
    except OSError as error:
        yield Damage(path, f"cannot be read ({error.strerror})")
