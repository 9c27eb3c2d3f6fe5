"""Convert a published checkpoint to a pack as a stream, so that any interruption can be resumed.

A unit of work is the resident tensors of one shard, or one layer of one variant. A finished unit is synced to disk and
has a marker beside the plan; the manifest is written last. A run that is killed leaves finished units, with which the
same command continues, and no directory that looks like a pack.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flashmoe_mlx.adapters.config import AdaptedConfig
from flashmoe_mlx.checkpoint.checkpoint import Checkpoint, read_config
from flashmoe_mlx.checkpoint.tensors import CheckpointTensors, classify_tensors
from flashmoe_mlx.errors import InputError, PackError
from flashmoe_mlx.formats.files import publish, write_atomically
from flashmoe_mlx.formats.folders import check_free_space, explain_write_errors, lock_folder
from flashmoe_mlx.formats.manifest import MANIFEST, RESIDENT, TEXT_FILES
from flashmoe_mlx.formats.record import GROUP_SIZES, QUANTIZED_BITS, LayerLayouts
from flashmoe_mlx.formats.untrusted import read_object, same_json
from flashmoe_mlx.pack.adapted import pack_adapted, refuse_settings
from flashmoe_mlx.pack.manifest import layout_name, variant_name, write_manifest
from flashmoe_mlx.pack.opening import Pack, open_pack
from flashmoe_mlx.pack.plan import (
    PackSettings,
    begin_or_resume,
    forget_plan,
    refuse_if_changed,
    restart_unless_same,
    resume_or_restart,
    state_folder,
)
from flashmoe_mlx.pack.progress import Progress, Silent
from flashmoe_mlx.pack.quantize import QUANTIZERS, convert_record
from flashmoe_mlx.pack.requantization import summarize_errors, write_errors
from flashmoe_mlx.pack.resident import ResidentPlan
from flashmoe_mlx.pack.shard import refuse_other_share
from flashmoe_mlx.pack.variant import VariantWriter
from flashmoe_mlx.pack.widths import DEFAULT, PUBLISHED, Width, layer_widths, parse_widths

_REMEDY = "make room or choose another out="


def pack_checkpoint(
    source: Path | Checkpoint,
    out: Path,
    bits: object = (4,),
    *,
    group_size: int = 64,
    resident_bits: int | None = 4,
    quantiser: str | None = None,
    shard: str | None = None,
    weights: Sequence[float] | None = None,
    packed_experts: Path | None = None,
    delete_source: bool = False,
    progress: Progress | None = None,
    ignored: Callable[[Path], bool] | None = None,
) -> Pack:
    """Make, finish or extend the pack in ``out`` from the checkpoint ``source``.

    Args:
        source: the checkpoint, or its folder.
        out: the folder of the pack.
        bits: the widths of each variant; see ``widths.parse_widths``. Projections of experts that the checkpoint has in
            the wanted width are copied byte for byte. None for 4 bits or, if the experts of the checkpoint have several
            formats, for copies.
        group_size: the number of weights that share a scale and a bias.
        resident_bits: the width of resident matrices that the checkpoint has dense; None to keep these dense.
        quantiser: chooses scales and biases, one of ``QUANTIZERS``; None for the default of each width.
        shard: the part of the experts that one of several nodes owns, such as "1/2"; None for all experts.
        weights: the weights of these nodes; None for equal weights.
        packed_experts: a flash-moe folder of the same model, whose files become the variant of their width by hard
            links.
        delete_source: delete every shard of the source that is no longer needed.
        progress: shows the progress.
        ignored: returns whether a path in ``out`` may be there before packing begins.

    Raises:
        CheckpointError: the source is incomplete or not supported.
        PackError: ``out`` cannot become this pack.
        FlashMoeError: no space is left.
    """
    own_weights = None if weights is None else tuple(map(float, weights))
    settings = replace(_checked(bits, group_size, resident_bits, quantiser), shard=shard, weights=own_weights)
    if settings.share is not None and packed_experts is not None:
        raise InputError(
            f"packed_experts={packed_experts}: holds all experts, not those of shard=", code="contradiction"
        )
    progress = progress or Silent()
    with explain_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with lock_folder(out):
            if not (out / MANIFEST).exists():
                checkpoint = begin_or_resume(source, out, settings, ignored)
                if isinstance(checkpoint.config, AdaptedConfig):
                    refuse_settings(settings, packed_experts)
                    return pack_adapted(checkpoint, out, progress, delete_source, _REMEDY)
                packer = _Packer(checkpoint, out, settings, progress, packed_experts, delete_source)
                return packer.run()
            pack = open_pack(out)
            _refuse_other_model(pack, source)
            if isinstance(pack.config, AdaptedConfig):
                refuse_settings(settings, packed_experts)
                return pack
            refuse_other_share(pack, settings.share)
            settings = _missing(pack, settings)
            if not settings.bits:
                forget_plan(out)
                return pack
            checkpoint = resume_or_restart(source, out, settings)
            return _Packer(checkpoint, out, settings, progress, packed_experts, delete_source, pack).run()


def add_variants(
    pack: Pack,
    bits: object,
    *,
    group_size: int = 64,
    quantiser: str | None = None,
    progress: Progress | None = None,
) -> Pack:
    """Add variants to a pack, made from its variant with the most bits.

    Args:
        pack: the pack.
        bits: the widths of the new variants; see ``widths.parse_widths``.
        group_size: the number of weights that share a scale and a bias.
        quantiser: chooses scales and biases; None for the default of each width.
        progress: shows the progress.

    Raises:
        InputError: a variant cannot be made from these experts.
        FlashMoeError: no space is left.
    """
    settings = _checked(bits, group_size, None, quantiser)
    with explain_write_errors(pack.folder), lock_folder(pack.folder):
        pack = open_pack(pack.folder)  # another process may have added to it since
        if isinstance(pack.config, AdaptedConfig):
            refuse_settings(settings, None)
            return pack
        settings = _missing(pack, settings)
        if settings.bits:
            experts = max(pack.experts.values(), key=lambda variant: variant.layout.code_bits)
            if experts.layout.bits in settings.bits:
                raise InputError(
                    f"bits={experts.layout.bits}: the pack has no experts with more bits to make this variant from; "
                    "make it from the checkpoint, with task=pack source=<checkpoint>",
                    code="source_needed",
                )
            variants = [
                VariantWriter(experts, pack.folder, width, group_size, progress or Silent(), quantiser, pack.share)
                for width in settings.bits
            ]
            _refuse_taken_names(pack, variants)
            restart_unless_same(pack.folder, settings)
            check_free_space(pack.folder, sum(variant.bytes_to_write() for variant in variants), _REMEDY)
            for variant in variants:
                for layer in range(experts.num_layers):
                    if not variant.has_layer(layer):
                        variant.write_layer(layer)
            _extend_manifest(pack, variants)
        forget_plan(pack.folder)
        return open_pack(pack.folder)


def _checked(bits: object, group_size: int, resident_bits: int | None, quantiser: str | None) -> PackSettings:
    choices = ", ".join(map(str, QUANTIZED_BITS))
    widths = parse_widths(bits)
    if group_size not in GROUP_SIZES:
        raise InputError(
            f"group_size={group_size}: choose from {', '.join(map(str, GROUP_SIZES))}", code="invalid_value"
        )
    if resident_bits is not None and resident_bits not in QUANTIZED_BITS:
        raise InputError(f"resident_bits={resident_bits}: choose from {choices}, or null", code="invalid_value")
    if quantiser is not None and quantiser not in QUANTIZERS:
        raise InputError(f"quantiser={quantiser}: choose from {', '.join(QUANTIZERS)}, or null", code="invalid_value")
    return PackSettings(widths, group_size, resident_bits, quantiser)


def _missing(pack: Pack, settings: PackSettings) -> PackSettings:
    """Return ``settings`` without the variants that ``pack`` has already."""
    missing = (width for width in settings.bits if not _has(pack, width, settings.quantiser))
    return replace(settings, bits=tuple(missing))


def _has(pack: Pack, width: Width, quantiser: str | None) -> bool:
    """Return whether ``pack`` has the variant of ``width``."""
    if width in (DEFAULT, PUBLISHED):
        # Copies have no quantiser; the default is 4 bits if the experts of the checkpoint had one format.
        copied = any(variant.quantizer is None for variant in pack.experts.values())
        return copied or (width == DEFAULT and variant_name(4, quantiser) in pack.experts)
    widths = layer_widths(width, pack.config.num_moe_layers)
    if len({*widths}) == 1 and len({*widths[0]}) == 1:
        return variant_name(widths[0][0], quantiser) in pack.experts
    for name, experts in pack.experts.items():
        if [tuple(form.bits for form in layout.formats) for layout in experts.layout] == widths:
            return name == layout_name(experts.layout, quantiser) or experts.quantizer is None
    return False


def _refuse_taken_names(pack: Pack | None, variants: Sequence[VariantWriter]) -> None:
    """Raise InputError if a variant has the name of another: mixes of the same mean width have one name."""
    taken = set() if pack is None else set(pack.experts)
    for variant in variants:
        if variant.name in taken:
            raise InputError(
                f"two variants of this pack would have the name {variant.name}; choose another mean width, or make "
                "another pack",
                code="contradiction",
            )
        taken.add(variant.name)


def _refuse_other_model(pack: Pack, source: Path | Checkpoint) -> None:
    published = source.published if isinstance(source, Checkpoint) else read_config(source)
    revisions = {pack.manifest["source"].get("revision")}
    if isinstance(source, Checkpoint):
        revisions.add(source.identity.get("revision"))
    if not same_json(published, read_object(pack.folder / "config.json")) or len(revisions - {None}) > 1:
        raise PackError(f"{pack.folder}: holds a pack of another model; choose another out=", code="another_model")


def _extend_manifest(pack: Pack, variants: Sequence[VariantWriter]) -> None:
    layouts = {name: experts.layout for name, experts in pack.experts.items()}
    layouts |= _finished(variants)
    quantisers = {name: experts.quantizer for name, experts in pack.experts.items()} | _quantisers(variants)
    source, skipped = pack.manifest["source"], pack.manifest["skipped_tensors"]
    errors = {**pack.manifest.get("requantization_error", {}), **_errors(variants)}
    write_manifest(pack.folder, pack.config, layouts, source, skipped, quantisers, errors, pack.share)


def _quantisers(variants: Sequence[VariantWriter]) -> dict[str, str | None]:
    return {variant.name: variant.quantiser for variant in variants}


def _errors(variants: Sequence[VariantWriter]) -> dict[str, Any]:
    """Return the errors of the variants that were decoded from codes."""
    return {variant.name: variant.errors for variant in variants if variant.errors}


def _finished(variants: Sequence[VariantWriter]) -> dict[str, LayerLayouts]:
    for variant in variants:
        variant.finish()
    return {variant.name: variant.layout for variant in variants}


class _Packer:
    """One run over a checkpoint, for a new pack or for more variants of ``pack``."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        out: Path,
        settings: PackSettings,
        progress: Progress,
        packed_experts: Path | None,
        delete_source: bool,
        pack: Pack | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._out = out
        self._pack = pack
        self._partial = out / f"{RESIDENT}.partial"
        self._progress = progress
        self._delete_source = delete_source
        self._tensors: CheckpointTensors = classify_tensors(checkpoint)
        self._resident = ResidentPlan(self._tensors, settings.resident_bits, settings.group_size)
        self._variants = [
            VariantWriter(
                self._tensors.experts, out, bits, settings.group_size, progress, settings.quantiser, settings.share
            )
            for bits in settings.bits
        ]
        self._share = settings.share
        _refuse_taken_names(pack, self._variants)
        if packed_experts is not None:
            self._take_over(packed_experts)

    def _take_over(self, packed_experts: Path) -> None:
        experts = self._tensors.experts
        for variant in self._variants:
            if variant.layout == experts.layout:
                variant.take_over(packed_experts)
                return
        raise InputError(
            f"packed_experts={packed_experts}: needs a quantized checkpoint as source=, and its width in bits=",
            code="contradiction",
        )

    def run(self) -> Pack:
        if self._pack is None and (self._out / RESIDENT).exists():
            # An earlier run ended after this renaming and before the manifest; parts of the file may be written again.
            (self._out / RESIDENT).replace(self._partial)
        check_free_space(self._out, self._bytes_to_write(), _REMEDY)
        for shards, do in self._units():
            for shard in shards:
                self._checkpoint.ensure(shard)
            do()
        refuse_if_changed(self._checkpoint, self._out)
        if self._pack is None:
            self._finish()
        else:
            _extend_manifest(self._pack, self._variants)
        forget_plan(self._out)
        return open_pack(self._out)

    def _bytes_to_write(self) -> int:
        variants = sum(variant.bytes_to_write() for variant in self._variants)
        resident = [shard for shard in self._resident_shards if not self._marker(shard).exists()]
        return variants + sum(self._resident.shard_bytes(shard) for shard in resident)

    @property
    def _resident_shards(self) -> Sequence[str]:
        return self._resident.shards if self._pack is None else ()

    def _units(self) -> Iterator[tuple[Iterable[str], Callable[[], None]]]:
        """Yield each unit of work with its shards, in the order of shards; delete shards that are no longer needed."""
        experts = self._tensors.experts
        layers = {layer: experts.shards(layer) for layer in range(experts.num_layers)}
        waiting: set[str] = set()
        for shard in self._checkpoint.shards:
            waiting.add(shard)
            if shard in self._resident_shards and not self._has_resident(shard):
                yield sorted(self._resident.needs(shard)), partial(self._write_resident, shard)
            seen = {name for name in self._checkpoint.shards if name <= shard}
            for layer in [layer for layer, needed in layers.items() if needed <= seen]:
                needed = layers.pop(layer)
                for variant in self._variants:
                    if not variant.has_layer(layer):
                        yield sorted(needed), partial(self._write_layer, variant, layer)
            if self._delete_source:
                later = (self._resident.needs(other) for other in self._resident_shards if other > shard)
                used = waiting.difference(*layers.values(), *later)
                for name in used:
                    self._checkpoint.discard(name)
                waiting -= used

    def _write_layer(self, variant: VariantWriter, layer: int) -> None:
        if self._pack is not None:
            self._refuse_other_experts(self._pack, layer)
        variant.write_layer(layer)

    def _refuse_other_experts(self, pack: Pack, layer: int) -> None:
        """Raise PackError unless an expert of the checkpoint equals the pack's: different models have equal shapes."""
        known = max(pack.experts.values(), key=lambda variant: variant.layout.code_bits)
        source = self._tensors.experts
        comparable = source.layout.code_bits >= known.layout.code_bits
        held = known.packed_in(layer)
        if not held:
            return
        payload, there = source.payload(layer, held[0]), known.payload(layer, held[0])
        if (
            not comparable
            or convert_record(payload, source.layout[layer], known.layout[layer], known.quantizer) != there
        ):
            raise PackError(
                f"{pack.folder}: its experts are not those of {self._checkpoint.folder}; choose another out=, "
                "or give the checkpoint from which it was made",
                code="another_model",
            )

    def _marker(self, shard: str) -> Path:
        return state_folder(self._out) / f"resident-{shard}.xxh3"

    def _resident_errors(self, shard: str) -> Path:
        return state_folder(self._out) / f"resident-{shard}.errors.json"

    def _has_resident(self, shard: str) -> bool:
        """Return whether an earlier run wrote the tensors of ``shard`` and they have not changed since."""
        if not self._marker(shard).exists() or not self._partial.exists():
            return False
        return self._marker(shard).read_text() == self._resident.shard_hash(shard, self._partial)

    def _write_resident(self, shard: str) -> None:
        self._progress.stage(f"resident weights in {shard}", self._resident.shard_bytes(shard))
        self._resident.write_shard(self._checkpoint, shard, self._partial, self._progress.advance)
        write_errors(self._resident_errors(shard), self._resident.errors(self._checkpoint, shard))
        write_atomically(self._marker(shard), self._resident.shard_hash(shard, self._partial).encode())

    def _finish(self) -> None:
        publish(self._partial, self._out / RESIDENT)
        for name in ("config.json", *TEXT_FILES):
            if (self._checkpoint.folder / name).is_file():
                write_atomically(self._out / name, (self._checkpoint.folder / name).read_bytes())
        config, identity = self._tensors.config, self._checkpoint.identity
        made = _quantisers(self._variants)
        errors, variants = _errors(self._variants), _finished(self._variants)
        if resident := summarize_errors(map(self._resident_errors, self._resident.shards)):
            errors["resident"] = resident
        skipped = self._tensors.skipped
        write_manifest(self._out, config, variants, identity, skipped, made, errors, self._share)
