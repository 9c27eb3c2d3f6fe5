"""Turn a published checkpoint into a pack, in a stream, so that any interruption can be resumed.

Work is done in units, the resident tensors of one shard or one layer of one variant. A finished unit is on disk,
synced, and has a marker in ``.packing/``; the manifest comes last. A run that is killed anywhere leaves units that the
same command picks up again, and no directory that could be taken for a pack.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.safetensors_header import TensorInfo
from flashmoe_mlx.checkpoint.tensors import CheckpointTensors, sort_tensors
from flashmoe_mlx.errors import CheckpointError, InputError, PackError
from flashmoe_mlx.expert_store import ExpertSource
from flashmoe_mlx.pack.files import (
    exclusive,
    explained_write_errors,
    publish,
    read_exactly,
    regular_file_size,
    write_atomically,
)
from flashmoe_mlx.pack.layer_file import write_layer_file
from flashmoe_mlx.pack.pack import (
    CHECKSUMS,
    MANIFEST,
    RESIDENT,
    TEXT_FILES,
    Pack,
    layer_file,
    open_pack,
    variant_directory,
    variant_name,
    write_manifest,
)
from flashmoe_mlx.pack.progress import Progress, Silent
from flashmoe_mlx.pack.quantise import convert_record
from flashmoe_mlx.pack.record import QUANTISED_BITS, RecordLayout
from flashmoe_mlx.pack.resident import ResidentPlan
from flashmoe_mlx.pack.verify import RecordReport, inspect_layer
from flashmoe_mlx.untrusted import read_object

_READ_AHEAD = 4


@dataclass(frozen=True, slots=True)
class PackSettings:
    """``bits`` of each variant; ``resident_bits`` of dense resident matrices, None to keep them."""

    bits: tuple[int, ...] = (4,)
    group_size: int = 64
    resident_bits: int | None = 4


def pack_checkpoint(
    source: Path | Checkpoint,
    out: Path,
    bits: Sequence[int] = (4,),
    *,
    group_size: int = 64,
    resident_bits: int | None = 4,
    packed_experts: Path | None = None,
    delete_source: bool = False,
    progress: Progress | None = None,
) -> Pack:
    """Make, finish or extend the pack in ``out`` from the checkpoint ``source``.

    Experts that the checkpoint already has in one of ``bits`` are copied byte for byte, others quantised in groups of
    ``group_size``. ``packed_experts`` is a flash-moe folder of the same model, taken over as the variant of its width
    by hard links. ``delete_source`` removes every shard once nothing more is needed from it.

    Raises:
        CheckpointError: the source is incomplete or not supported.
        PackError: ``out`` cannot become this pack.
        FlashMoeError: no space left.
    """
    settings = PackSettings(tuple(dict.fromkeys(bits)), group_size, resident_bits)
    if not settings.bits or any(width not in QUANTISED_BITS for width in settings.bits):
        raise InputError(f"bits={list(bits)}: choose from {', '.join(map(str, QUANTISED_BITS))}")
    if resident_bits is not None and resident_bits not in QUANTISED_BITS:
        raise InputError(f"resident_bits={resident_bits}: choose from {', '.join(map(str, QUANTISED_BITS))}, or null")
    with explained_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out):
            if (out / MANIFEST).is_file():
                return _extend(open_pack(out), source, settings, progress or Silent())
            checkpoint = _begin_or_resume(source, out, settings)
            packer = _Packer(checkpoint, out, settings, progress or Silent(), packed_experts, delete_source)
            return packer.run()


def add_variants(pack: Pack, bits: Sequence[int], *, group_size: int = 64, progress: Progress | None = None) -> Pack:
    """Add variants to a pack, made of the experts with the most bits that it has."""
    with explained_write_errors(pack.folder), exclusive(pack.folder):
        return _extend(pack, None, PackSettings(tuple(bits), group_size), progress or Silent())


def _extend(pack: Pack, source: Path | Checkpoint | None, settings: PackSettings, progress: Progress) -> Pack:
    """Add the variants of ``settings`` that a finished pack lacks."""
    experts: ExpertSource = max(pack.experts.values(), key=lambda variant: variant.layout.bits or 0)
    if source is not None:
        checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
        if checkpoint.published != read_object(pack.folder / "config.json"):
            raise PackError(f"{pack.folder}: holds a pack of another model; choose another out=")
        experts = sort_tensors(checkpoint).experts
    missing = [bits for bits in settings.bits if variant_name(bits) not in pack.experts]
    if not missing:
        return pack
    variants = {name: packed.layout for name, packed in pack.experts.items()}
    state = _state_folder(pack.folder)
    state.mkdir(exist_ok=True)
    for bits in missing:
        variant = _VariantWriter(experts, pack.folder, bits, settings.group_size, progress)
        for layer in range(experts.num_layers):
            variant.write_layer(layer)
        variants[variant.name] = variant.finish()
    write_manifest(pack.folder, pack.config, variants, pack.manifest["source"], pack.manifest["skipped_tensors"])
    shutil.rmtree(state)
    return open_pack(pack.folder)


def _state_folder(out: Path) -> Path:
    return out / ".packing"


def _begin_or_resume(source: Path | Checkpoint, out: Path, settings: PackSettings) -> Checkpoint:
    """The checkpoint to pack; its index is kept, so that a resumed run needs only the shards still to be read."""
    folder = source.folder if isinstance(source, Checkpoint) else source
    if folder.resolve() == out.resolve():
        raise PackError(f"{out}: out= must not be the checkpoint's own folder")
    begun = _state_folder(out) / "plan.json"
    if not begun.is_file():
        foreign = [path.name for path in out.iterdir() if path.name not in (".lock", ".packing", ".download")]
        if foreign:
            raise PackError(f"{out}: not empty ({min(foreign)} is there), and not a pack begun by this tool")
        checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
        begun.parent.mkdir(exist_ok=True)
        plan = {
            "source": str(folder.resolve()),
            "settings": asdict(settings),
            "config": checkpoint.published,
            "tensors": {name: list(asdict(tensor).values()) for name, tensor in checkpoint.tensors.items()},
        }
        write_atomically(begun, json.dumps(plan).encode())
        return checkpoint
    plan = read_object(begun)
    if plan["source"] != str(folder.resolve()):
        raise PackError(f"{out}: holds an unfinished pack of {plan['source']}; delete it or choose another out=")
    if plan["settings"] != json.loads(json.dumps(asdict(settings))):
        raise PackError(f"{out}: this pack was begun with {_shown(plan['settings'])}; repeat these, or delete it")
    if isinstance(source, Checkpoint):
        return source
    if (folder / "config.json").is_file() and read_object(folder / "config.json") != plan["config"]:
        raise CheckpointError(f"{folder}: config.json changed since packing began; delete {out} and pack again")
    tensors = {
        name: TensorInfo(shard, dtype, tuple(shape), begin, nbytes)
        for name, (shard, dtype, shape, begin, nbytes) in plan["tensors"].items()
    }
    return Checkpoint(folder, plan["config"], tensors)


def _shown(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={'null' if value is None else value}" for key, value in settings.items())


class _Packer:
    """One run over a checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        out: Path,
        settings: PackSettings,
        progress: Progress,
        packed_experts: Path | None,
        delete_source: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._out = out
        self._partial = out / f"{RESIDENT}.partial"
        self._progress = progress
        self._delete_source = delete_source
        self._tensors: CheckpointTensors = sort_tensors(checkpoint)
        self._resident = ResidentPlan(self._tensors, settings.resident_bits, settings.group_size)
        self._variants = [
            _VariantWriter(self._tensors.experts, out, bits, settings.group_size, progress) for bits in settings.bits
        ]
        if packed_experts is not None:
            self._take_over(packed_experts)

    def _take_over(self, packed_experts: Path) -> None:
        experts = self._tensors.experts
        for variant in self._variants:
            if variant.layout == experts.layout:
                variant.take_over(packed_experts)
                return
        raise InputError(
            f"packed_experts={packed_experts}: needs a quantised checkpoint as source=, and its width in bits="
        )

    def run(self) -> Pack:
        self._refuse_if_too_large()
        for shards, do in self._units():
            for shard in shards:
                self._checkpoint.ensure(shard)
            do()
        return self._finish()

    def _refuse_if_too_large(self) -> None:
        needed = sum(variant.bytes_to_write() for variant in self._variants)
        needed += sum(
            self._resident.shard_bytes(shard) for shard in self._resident.shards if not self._has_resident(shard)
        )
        free = shutil.disk_usage(self._out).free
        if needed > free:
            raise PackError(
                f"{self._out}: no space: the pack needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free; "
                "make room or choose another out="
            )

    def _units(self) -> Iterator[tuple[Sequence[str], Callable[[], None]]]:
        """The work, with the shards of each unit, so that each shard is needed once; deletes the used ones."""
        layers = {layer: self._tensors.experts.shards(layer) for layer in range(self._tensors.experts.num_layers)}
        seen: set[str] = set()
        for shard in self._checkpoint.shards:
            seen.add(shard)
            if shard in self._resident.shards and not self._has_resident(shard):
                yield [shard], lambda shard=shard: self._write_resident(shard)  # type: ignore[misc]
            for layer in [layer for layer, needed in layers.items() if needed <= seen]:
                needed = layers.pop(layer)
                for variant in self._variants:
                    if not variant.has_layer(layer):
                        yield sorted(needed), lambda variant=variant, layer=layer: variant.write_layer(layer)  # type: ignore[misc]
            if self._delete_source:
                pending = {name for needed in layers.values() for name in needed}
                for used in seen - pending:
                    self._checkpoint.discard(used)

    def _marker(self, shard: str) -> Path:
        return _state_folder(self._out) / f"resident-{shard}.done"

    def _has_resident(self, shard: str) -> bool:
        return self._marker(shard).exists() and (self._partial.exists() or (self._out / RESIDENT).exists())

    def _write_resident(self, shard: str) -> None:
        self._progress.stage(f"resident weights in {shard}", self._resident.shard_bytes(shard))
        self._resident.write_shard(self._checkpoint, shard, self._partial, self._progress.advance)
        write_atomically(self._marker(shard), b"")

    def _finish(self) -> Pack:
        if self._partial.exists():
            publish(self._partial, self._out / RESIDENT)
        for name in ("config.json", *TEXT_FILES):
            if (self._checkpoint.folder / name).is_file():
                write_atomically(self._out / name, (self._checkpoint.folder / name).read_bytes())
        variants = {variant.name: variant.finish() for variant in self._variants}
        write_manifest(self._out, self._checkpoint.config, variants, self._checkpoint.identity, self._tensors.skipped)
        shutil.rmtree(_state_folder(self._out))
        shutil.rmtree(self._out / ".download", ignore_errors=True)
        return open_pack(self._out)


class _VariantWriter:
    """Writes the layer files of one variant, each with its records' hashes."""

    def __init__(self, experts: ExpertSource, out: Path, bits: int, group_size: int, progress: Progress) -> None:
        self._experts = experts
        self._out = out
        self._progress = progress
        self._linked: Path | None = None
        self.name = variant_name(bits)
        self.layout = self._layout(bits, group_size)
        self._directory = out / variant_directory(self.name)
        self._checked: set[int] = set()

    def _layout(self, bits: int, group_size: int) -> RecordLayout:
        source = self._experts.layout
        if source.bits == bits:
            return source
        if source.bits is not None and source.bits < bits:
            raise InputError(f"bits={bits}: the source has experts of {source.bits} bits; more would add nothing")
        return RecordLayout(source.hidden_size, source.intermediate_size, bits, group_size, source.dtype)

    @property
    def _layer_bytes(self) -> int:
        return self._experts.num_experts * self.layout.record_bytes

    def _hashes(self, layer: int) -> Path:
        return _state_folder(self._out) / f"{self.name}-layer_{layer:02d}.xxh3"

    def bytes_to_write(self) -> int:
        """Bytes of the layers that are not there yet."""
        if self._linked is not None:
            return 0
        return self._layer_bytes * sum(not self._hashes(layer).exists() for layer in range(self._experts.num_layers))

    def take_over(self, folder: Path) -> None:
        """Use the layer files in ``folder``, flash-moe's, in place of writing them."""
        for layer in range(self._experts.num_layers):
            path = folder / layer_file(layer)
            size = regular_file_size(path)
            if size != self._layer_bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise PackError(f"{path}: {found}; this model's layers have {self._layer_bytes} bytes")
        self._linked = folder

    def has_layer(self, layer: int) -> bool:
        """Whether an earlier run finished ``layer``: its file must still hash to what that run recorded."""
        marker, path = self._hashes(layer), self._directory / layer_file(layer)
        if not marker.exists() or regular_file_size(path) != self._layer_bytes:
            return False
        if layer not in self._checked:
            self._progress.stage(f"checking {self.name} layer {layer}", self._layer_bytes)
            expected = np.fromfile(marker, "<u8")
            for expert, report in enumerate(self._inspect(path)):
                if report.digest != int(expected[expert]):
                    return False
            self._checked.add(layer)
        return True

    def _inspect(self, path: Path) -> Iterator[RecordReport]:
        for report in inspect_layer(path, self.layout, self._experts.num_experts):
            self._progress.advance(self.layout.record_bytes)
            yield report

    def write_layer(self, layer: int) -> None:
        """Write, or link, the file of ``layer`` and record its hashes."""
        if self.has_layer(layer):
            return
        self._directory.mkdir(exist_ok=True)
        path = self._directory / layer_file(layer)
        self._progress.stage(f"{self.name} layer {layer + 1} of {self._experts.num_layers}", self._layer_bytes)
        digests: list[int] = []
        for expert, report in enumerate(self._link(layer, path) if self._linked else self._write(layer, path)):
            if report.not_finite:
                raise CheckpointError(f"layer {layer} expert {expert}: {report.not_finite} holds NaN or infinity")
            digests.append(report.digest)
        write_atomically(self._hashes(layer), np.array(digests, "<u8").tobytes())

    def _write(self, layer: int, path: Path) -> Iterator[RecordReport]:
        records = (convert_record(payload, self._experts.layout, self.layout) for payload in self._payloads(layer))
        for report in write_layer_file(path, records, self.layout):
            self._progress.advance(self.layout.record_bytes)
            yield report

    def _payloads(self, layer: int) -> Iterator[bytearray]:
        with ThreadPoolExecutor(_READ_AHEAD) as pool:
            for start in range(0, self._experts.num_experts, _READ_AHEAD):
                experts = range(start, min(start + _READ_AHEAD, self._experts.num_experts))
                yield from pool.map(lambda expert: read_payload(self._experts, layer, expert), experts)

    def _link(self, layer: int, path: Path) -> Iterator[RecordReport]:
        assert self._linked is not None
        theirs = self._linked / layer_file(layer)
        path.unlink(missing_ok=True)
        try:
            os.link(theirs, path)
        except OSError as error:
            raise PackError(
                f"{theirs}: cannot be linked into {path.parent} ({error.strerror}); "
                "choose an out= on the same filesystem as packed_experts="
            ) from None
        with theirs.open("rb") as file:
            for expert in (0, self._experts.num_experts - 1):
                file.seek(expert * self.layout.record_bytes)
                if file.read(self.layout.payload_bytes) != read_payload(self._experts, layer, expert):
                    path.unlink()
                    raise PackError(f"{theirs}: expert {expert} is not that of the checkpoint: packed from another one")
        yield from self._inspect(path)

    def finish(self) -> RecordLayout:
        """Join the hashes of all layers, which must be there, into the variant's checksums."""
        hashes = [self._hashes(layer).read_bytes() for layer in range(self._experts.num_layers)]
        write_atomically(self._directory / CHECKSUMS, b"".join(hashes))
        return self.layout


def read_payload(experts: ExpertSource, layer: int, expert: int) -> bytearray:
    """The bytes of an expert's components, joined in the order of its record."""
    extents = experts.extents(layer, expert)
    payload = bytearray(sum(extent.nbytes for extent in extents))
    done = 0
    for extent in extents:
        fd = os.open(extent.path, os.O_RDONLY)
        try:
            read_exactly(fd, memoryview(payload)[done : done + extent.nbytes], extent.offset)
        except EOFError:
            raise CheckpointError(f"{extent.path}: the file was cut short while it was being read") from None
        finally:
            os.close(fd)
        done += extent.nbytes
    return payload
