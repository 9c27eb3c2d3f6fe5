"""Write the layer files of one variant of a pack."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe_mlx.errors import CheckpointError, InputError, PackError
from flashmoe_mlx.formats.extents import RecordSource
from flashmoe_mlx.formats.files import regular_file_size, sync, write_atomically
from flashmoe_mlx.formats.manifest import CHECKSUMS, layer_file, variant_directory
from flashmoe_mlx.formats.record import LayerLayouts
from flashmoe_mlx.formats.shares import Share
from flashmoe_mlx.pack.inspection import RecordReport, find_nonfinite, inspect_layer, inspect_record
from flashmoe_mlx.pack.layer_file import write_layer_file
from flashmoe_mlx.pack.manifest import layout_name
from flashmoe_mlx.pack.plan import state_folder
from flashmoe_mlx.pack.progress import Progress
from flashmoe_mlx.pack.quantize import BY_WIDTH, convert_record, default_quantizer
from flashmoe_mlx.pack.requantization import record_errors, summarize_errors, write_errors
from flashmoe_mlx.pack.widths import Width, target_layout

_READ_AHEAD = 4


class VariantWriter:
    """The conversion of experts to a variant; each finished layer is marked by its hashes.

    Args:
        experts: the source.
        out: the folder of the pack.
        width: the widths of the variant.
        group_size: the number of weights that share a scale and a bias; ignored where the source has the width already.
        progress: shows the progress.
        quantiser: chooses scales and biases; None for the default of the width.
        share: the share whose experts are written; None for all experts.

    Raises:
        InputError: the source has fewer bits, or has these widths already and a ``quantiser`` is given.
    """

    def __init__(
        self,
        experts: RecordSource,
        out: Path,
        width: Width,
        group_size: int,
        progress: Progress,
        quantiser: str | None = None,
        share: Share | None = None,
    ) -> None:
        self._experts = experts
        self._share = share
        self._progress = progress
        self._linked: Path | None = None
        self.layout: LayerLayouts = target_layout(width, experts.layout, group_size)
        self.name: str = layout_name(self.layout, quantiser)
        self._directory = out / variant_directory(self.name)
        self._state = state_folder(out)
        copied = self.layout == experts.layout
        if copied and self.name != layout_name(self.layout):
            found = self.layout.single_format
            raise InputError(
                f"quantiser={quantiser}: the source has experts of {found.bits if found else 'these'} bits already, "
                "which are copied; leave out quantiser=, or this width of bits=",
                code="contradiction",
            )
        single = self.layout.single_format
        chosen = quantiser or (BY_WIDTH if single is None else default_quantizer(single.bits or 0))
        self.quantiser: str | None = None if copied else chosen
        """The quantiser; None if records are copies."""

    def held(self, layer: int) -> Sequence[int]:
        """Return the experts of ``layer`` that the variant holds."""
        experts = self._experts.num_experts
        return range(experts) if self._share is None else self._share.experts(layer, experts)

    def _layer_bytes(self, layer: int) -> int:
        return len(self.held(layer)) * self.layout[layer].record_bytes

    def _hashes(self, layer: int) -> Path:
        return self._state / f"{self.name}-layer_{layer:02d}.xxh3"

    def _errors(self, layer: int) -> Path:
        return self._state / f"{self.name}-layer_{layer:02d}.errors.json"

    @property
    def errors(self) -> dict[str, Any]:
        """The mean and the worst relative error of each projection that was decoded, over all finished layers."""
        return summarize_errors(self._errors(layer) for layer in range(self._experts.num_layers))

    def bytes_to_write(self) -> int:
        """Return the number of bytes of all unfinished layers."""
        if self._linked is not None:
            return 0
        unfinished = (layer for layer in range(self._experts.num_layers) if not self._hashes(layer).exists())
        return sum(self._layer_bytes(layer) for layer in unfinished)

    def take_over(self, folder: Path) -> None:
        """Link the layer files in ``folder``, made by flash-moe, instead of writing files.

        Raises:
            PackError: a file is missing or has another size.
        """
        for layer in range(self._experts.num_layers):
            path = folder / layer_file(layer)
            size = regular_file_size(path)
            if size != self._layer_bytes(layer):
                found = "is missing" if size is None else f"has {size} bytes"
                raise PackError(
                    f"{path}: {found}; this model's layers have {self._layer_bytes(layer)} bytes",
                    code="invalid_packed_experts",
                )
        self._linked = folder

    def has_layer(self, layer: int) -> bool:
        """Return whether an earlier run finished ``layer`` and the file still has the recorded hashes."""
        marker, path = self._hashes(layer), self._directory / layer_file(layer)
        size = self._layer_bytes(layer)
        if not marker.exists() or regular_file_size(path) != size:
            return False
        self._progress.stage(f"checking {self.name} layer {layer + 1} of {self._experts.num_layers}", size)
        found = [report.digest for report in self._inspect(layer, path)]
        return found == list(np.fromfile(marker, "<u8"))

    def _inspect(self, layer: int, path: Path) -> Iterator[RecordReport]:
        layout = self.layout[layer]
        for report in inspect_layer(path, layout, len(self.held(layer))):
            self._progress.advance(layout.record_bytes)
            yield report

    def write_layer(self, layer: int) -> None:
        """Write or link the file of ``layer`` and record its hashes.

        Raises:
            CheckpointError: an expert holds NaN or infinity.
            PackError: the linked file belongs to another checkpoint, or is on another filesystem.
        """
        self._directory.mkdir(exist_ok=True)
        path = self._directory / layer_file(layer)
        self._progress.stage(f"{self.name} layer {layer + 1} of {self._experts.num_layers}", self._layer_bytes(layer))
        reports = self._write(layer, path) if self._linked is None else self._link(layer, self._linked, path)
        digests: list[int] = []
        for expert, report in zip(self.held(layer), reports, strict=True):
            if report.fault:
                raise CheckpointError(f"layer {layer} expert {expert} of the source: {report.fault}", code="not_finite")
            digests.append(report.digest)
        write_atomically(self._hashes(layer), np.array(digests, "<u8").tobytes())

    def _write(self, layer: int, path: Path) -> Iterator[RecordReport]:
        layout = self.layout[layer]
        for report in write_layer_file(path, self._records(layer), layout):
            self._progress.advance(layout.record_bytes)
            yield report

    def _records(self, layer: int) -> Iterator[memoryview]:
        source, target = self._experts.layout[layer], self.layout[layer]
        errors: dict[str, list[float]] = {}
        for expert, payload in zip(self.held(layer), self._payloads(layer), strict=True):
            # MLX quantizes a NaN to an ordinary number, so it must be found before.
            fault = None if source == target else find_nonfinite(payload, source)
            if fault:
                raise CheckpointError(f"layer {layer} expert {expert} of the source: {fault}", code="not_finite")
            record = convert_record(payload, source, target, self.quantiser)
            for projection, error in record_errors(record, target, self._experts.exact(layer, expert)).items():
                errors.setdefault(projection, []).append(error)
            yield record
        write_errors(self._errors(layer), errors)

    def _payloads(self, layer: int) -> Iterator[bytearray]:
        """Yield the components of each expert, joined in the order of its record; a few threads read ahead."""
        with ThreadPoolExecutor(_READ_AHEAD) as pool:
            held = self.held(layer)
            for start in range(0, len(held), _READ_AHEAD):
                experts = held[start : start + _READ_AHEAD]
                yield from pool.map(lambda expert: self._experts.payload(layer, expert), experts)

    def _link(self, layer: int, folder: Path, path: Path) -> Iterator[RecordReport]:
        """Link the file of flash-moe and compare it with the checkpoint: after an interruption it has holes."""
        theirs, layout = folder / layer_file(layer), self.layout[layer]
        path.unlink(missing_ok=True)
        try:
            os.link(theirs, path)
        except OSError as error:
            raise PackError(
                f"{theirs}: cannot be linked into {path.parent} ({error.strerror}); "
                "choose an out= on the same filesystem as packed_experts=",
                code="cannot_link",
            ) from None
        sync(path.parent)
        with theirs.open("rb") as file:
            for expert, payload in enumerate(self._payloads(layer)):
                record = file.read(layout.record_bytes)
                if record != payload.ljust(layout.record_bytes, b"\0"):
                    path.unlink()
                    raise PackError(
                        f"{theirs}: expert {expert} differs from the checkpoint: the file is unfinished, damaged or of "
                        "another model",
                        code="invalid_packed_experts",
                    )
                self._progress.advance(layout.record_bytes)
                yield inspect_record(memoryview(record), layout)

    def finish(self) -> None:
        """Join the hashes of all layers, which must be finished, to the checksums of the variant."""
        hashes = [self._hashes(layer).read_bytes() for layer in range(self._experts.num_layers)]
        write_atomically(self._directory / CHECKSUMS, b"".join(hashes))
