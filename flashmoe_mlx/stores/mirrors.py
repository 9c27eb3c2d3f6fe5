"""Copies of a pack's experts on several disks, read as one: each disk delivers a share of every record."""

import contextlib
import logging
import mmap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from flashmoe_mlx.errors import InputError, PackError
from flashmoe_mlx.formats.extents import ExpertSource, Extent
from flashmoe_mlx.formats.files import regular_file_size
from flashmoe_mlx.formats.manifest import CHECKSUMS, PackedExperts, layer_file
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.stores.contract import ExpertReadError
from flashmoe_mlx.stores.thread_reader import ThreadReader

_log = logging.getLogger(__name__)

_PIECE = 4096
"""Records are cut at multiples of this number of bytes, which direct reads require."""
_READERS = 4
_MOST_BYTES, _MOST_SECONDS = 2**28, 0.2
"""Limits of the measurement of one folder."""


@dataclass(frozen=True)
class MirroredExperts(PackedExperts):
    """The records of one variant of a pack, in the folder of the pack and in copies of it.

    Attributes:
        held: the layers in each folder of the variant; ``directory`` holds all.
        rates: the measured bandwidth of each folder in bytes per second.
    """

    held: Mapping[Path, Sequence[int]] = field(default_factory=dict)
    rates: Mapping[Path, float] = field(default_factory=dict)

    def extents(self, layer: int, expert: int) -> list[Extent]:
        """Return the pieces of the record of ``expert``, one from each folder, in proportion to their bandwidths."""
        start = self.place(layer, expert) * self.layout[layer].record_bytes
        return [Extent(path, start + begin, end - begin) for path, begin, end in self._pieces[layer]]

    @cached_property
    def _pieces(self) -> list[list[tuple[Path, int, int]]]:
        """For each layer the files and the bytes of every record that are read from them."""
        return [self._cut(layer) for layer in range(self.num_layers)]

    def _cut(self, layer: int) -> list[tuple[Path, int, int]]:
        folders = [folder for folder, layers in self.held.items() if layer in layers]
        total = sum(self.rates[folder] for folder in folders)
        pieces: list[tuple[Path, int, int]] = []
        begin, passed = 0, 0.0
        for folder in folders:
            passed += self.rates[folder]
            end = round(passed / total * self.layout[layer].record_bytes / _PIECE) * _PIECE
            if end > begin:
                pieces.append((folder / layer_file(layer), begin, end))
            begin = end
        return pieces


def open_mirrors(source: ExpertSource, mirrors: object) -> ExpertSource:
    """Return a source that reads from the pack of ``source`` and from the folders in ``mirrors``; measure them first.

    A mirror is a copy of the pack, or a folder that ``task=pack mirror=<folder>`` has made. It need not hold all
    layers.

    Args:
        source: the experts of a pack.
        mirrors: unchecked paths of folders; None or empty for no mirrors.

    Raises:
        InputError: ``mirrors`` is not a list of paths (code "option_of_another_type"), or ``source`` is not a pack
            ("not_a_pack").
        PackError: a folder holds no copy of this variant (code "no_mirror") or a copy of other experts
            ("another_model"), or a layer file has another size ("wrong_size").
    """
    if not mirrors:
        return source
    if isinstance(mirrors, str) or not isinstance(mirrors, Sequence) or not all(isinstance(m, str) for m in mirrors):
        raise InputError(
            f"backend.mirrors={mirrors}: must be a list of folders, for instance [/mnt/second/pack]",
            code="option_of_another_type",
        )
    if not isinstance(source, PackedExperts):
        raise InputError("backend.mirrors needs a pack as model.path (task=pack)", code="not_a_pack")
    held = {source.directory: list(range(source.num_layers))}
    for mirror in mirrors:
        held |= _check(source, expand_path(mirror))
    rates = {folder: _bandwidth(source, layers, folder) for folder, layers in held.items()}
    _log.info("mirrors: %s", ", ".join(f"{folder} {rate / 1e9:.2f} GB/s" for folder, rate in rates.items()))
    sizes = source.layout, source.num_experts, source.quantizer, source.packed
    return MirroredExperts(source.directory, *sizes, held, rates)


def _check(source: PackedExperts, mirror: Path) -> dict[Path, list[int]]:
    """Return the folder of the variant in ``mirror`` and the layers it holds, after a comparison with ``source``."""
    copy = source.copy_in(mirror)
    folder = copy.directory
    advice = f"make one: task=pack source={source.directory.parent} mirror={mirror}"
    if folder.resolve() == source.directory.resolve():
        raise PackError(f"backend.mirrors: {mirror} is the folder of the pack itself", code="no_mirror")
    try:
        checksums = (folder / CHECKSUMS).read_bytes()
    except OSError:
        raise PackError(
            f"backend.mirrors: {folder}: holds no copy of these experts; {advice}", code="no_mirror"
        ) from None
    if checksums != (source.directory / CHECKSUMS).read_bytes():
        raise PackError(f"backend.mirrors: {folder}: holds other experts than the pack; {advice}", code="another_model")
    sizes = [regular_file_size(copy.layer_path(layer)) for layer in range(source.num_layers)]
    for layer, size in enumerate(sizes):
        if size not in (None, source.layer_bytes(layer)):
            raise PackError(
                f"backend.mirrors: {copy.layer_path(layer)} has {size} bytes instead of {source.layer_bytes(layer)}; "
                f"delete it, and {advice}",
                code="wrong_size",
            )
    held = [layer for layer, size in enumerate(sizes) if size is not None]
    if not held:
        raise PackError(f"backend.mirrors: {folder}: holds no layer; {advice}", code="no_mirror")
    return {folder: held}


def _bandwidth(source: PackedExperts, held: Sequence[int], folder: Path) -> float:
    """Measure the bandwidth of ``folder``, which holds the layers ``held``, in bytes per second.

    Random records are read past the page cache, if the filesystem supports it, because reads from memory say nothing
    about the disk.

    Raises:
        ExpertReadError: a record cannot be read.
    """
    copy = replace(source, directory=folder)
    try:
        return _read_rate(copy, held, direct=True)
    except ExpertReadError as error:
        if error.code != "no_direct_reads":
            raise
        return _read_rate(copy, held, direct=False)


def _read_rate(source: PackedExperts, layers: Sequence[int], direct: bool) -> float:
    record = source.layout.record_bytes
    memory = memoryview(mmap.mmap(-1, _READERS * record))
    rows = [memory[row * record : (row + 1) * record] for row in range(_READERS)]
    choice = np.random.default_rng(0)
    done, start = 0, time.perf_counter()
    with contextlib.closing(ThreadReader(source, _READERS, direct=direct)) as reader:
        while done < _MOST_BYTES and time.perf_counter() - start < _MOST_SECONDS:
            layer = int(choice.choice(layers))
            held = source.packed_in(layer)
            experts = choice.choice(held, min(_READERS, len(held)), replace=False).tolist()
            _, nbytes = reader.read(layer, list(zip(experts, rows, strict=False)))
            done += nbytes
    return done / (time.perf_counter() - start)
