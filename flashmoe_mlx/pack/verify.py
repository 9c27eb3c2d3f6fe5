"""Check every byte of a pack against its checksums."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from flashmoe_mlx.pack.files import read_exactly
from flashmoe_mlx.pack.pack import CHECKSUMS, Pack, PackedExperts, file_hash
from flashmoe_mlx.pack.progress import Progress, Silent
from flashmoe_mlx.pack.record import RecordLayout

_READERS = 4
_EXPONENT_BITS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}
"""Per float type, the word that holds it and the bits that are all set in NaN and infinity alone."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A part of a pack that is not what was packed; str() is a line for people."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def verify_pack(pack: Pack, progress: Progress | None = None) -> list[Damage]:
    """Read all of ``pack`` and list what is damaged."""
    progress = progress or Silent()
    progress.stage("verifying", sum(entry["bytes"] for entry in pack.manifest["files"].values()))
    found: list[Damage] = []
    for name, entry in pack.manifest["files"].items():
        if "xxh3" in entry:
            if file_hash(pack.folder / name) != entry["xxh3"]:
                found.append(Damage(pack.folder / name, "the checksum differs"))
            progress.advance(entry["bytes"])
    for variant, experts in pack.experts.items():
        found.extend(_damaged_records(variant, experts, progress))
    return found


@dataclass(frozen=True, slots=True)
class RecordReport:
    """The XXH3 of a record, and the first of its components that holds NaN or infinity."""

    digest: int
    not_finite: str | None


def inspect_record(record: memoryview, layout: RecordLayout) -> RecordReport:
    """Hash a record and look for values that no healthy model has."""
    return RecordReport(xxhash.xxh3_64_intdigest(record), _not_finite(record, layout))


def inspect_layer(path: Path, layout: RecordLayout, num_experts: int) -> Iterator[RecordReport]:
    """Inspect each record of a layer file, in order; a few threads read ahead.

    Raises:
        EOFError: the file is shorter than its records.
    """
    size = layout.record_bytes
    fd = os.open(path, os.O_RDONLY)

    def inspect(expert: int) -> RecordReport:
        record = memoryview(bytearray(size))
        read_exactly(fd, record, expert * size)
        return inspect_record(record, layout)

    try:
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, num_experts, _READERS):
                yield from pool.map(inspect, range(start, min(start + _READERS, num_experts)))
    finally:
        os.close(fd)


def _not_finite(record: memoryview, layout: RecordLayout) -> str | None:
    for component in layout.components:
        if component.dtype in _EXPONENT_BITS:
            word, mask = _EXPONENT_BITS[component.dtype]
            data = record[component.offset : component.offset + component.nbytes]
            values = np.frombuffer(data, word).astype(np.uint32)
            if ((values & mask) == mask).any():
                return component.name
    return None


def _damaged_records(variant: str, experts: PackedExperts, progress: Progress) -> Iterator[Damage]:
    expected = np.fromfile(experts.directory / CHECKSUMS, "<u8").reshape(experts.num_layers, experts.num_experts)
    for layer in range(experts.num_layers):
        path = experts.layer_path(layer)
        for expert, report in enumerate(inspect_layer(path, experts.layout, experts.num_experts)):
            record = f"{variant} layer {layer} expert {expert} (record at byte {expert * experts.layout.record_bytes})"
            if report.digest != int(expected[layer, expert]):
                yield Damage(path, f"{record} is damaged: its checksum differs")
            elif report.not_finite:
                yield Damage(path, f"{record} is damaged: {report.not_finite} holds NaN or infinity")
            progress.advance(experts.layout.record_bytes)
