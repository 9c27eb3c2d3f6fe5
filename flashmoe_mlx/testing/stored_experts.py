"""Random experts on disk, and the bytes that a store must serve."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmoe_mlx.formats.extents import ExpertSource, Extent
from flashmoe_mlx.formats.manifest import PackedExperts
from flashmoe_mlx.formats.record import FLOAT_MODES, LayerLayouts, MatrixFormat, RecordLayout

LAYERS, EXPERTS = 4, 12
_SIZE, _GROUP_SIZE = 128, 64


@dataclass(frozen=True)
class StoredExperts:
    """Experts on disk.

    Attributes:
        source: the location of the experts, for a store.
        expected: for each (layer, expert) the first bytes of its slot. The files are written from these bytes, so they
            do not depend on any store.
    """

    source: ExpertSource
    expected: Mapping[tuple[int, int], bytes]

    def paths(self) -> list[Path]:
        """Return the paths of all files of the experts."""
        every = (self.source.extents(layer, expert) for layer, expert in self.expected)
        return sorted({extent.path for extents in every for extent in extents})


def write_experts(folder: Path, bits: int | str | Sequence[tuple[int, int, int]], contiguous: bool) -> StoredExperts:
    """Write random experts into ``folder``.

    Args:
        folder: an empty folder.
        bits: the width of all experts; or one of MLX's float modes; or the widths of gate, up and down in each layer.
        contiguous: whether an expert is one piece, as in a pack, or a piece for each tensor, as in a checkpoint.
    """
    widths = [(bits,) * 3] * LAYERS if isinstance(bits, int | str) else bits
    layout = LayerLayouts.of(RecordLayout(_SIZE, _SIZE, *map(_format, own)) for own in widths)
    random = np.random.default_rng(layout[0].payload_bytes)
    payloads = {(n, e): random.bytes(layout[n].payload_bytes) for n in range(LAYERS) for e in range(EXPERTS)}
    if not contiguous:
        return StoredExperts(_write_tensors(folder, layout, payloads), payloads)
    source = PackedExperts(folder, layout, EXPERTS)
    records = {(n, e): payload.ljust(layout[n].record_bytes, b"\0") for (n, e), payload in payloads.items()}
    for layer in range(LAYERS):
        source.layer_path(layer).write_bytes(b"".join(records[layer, expert] for expert in range(EXPERTS)))
    return StoredExperts(source, records)


def _format(width: int | str) -> MatrixFormat:
    if isinstance(width, str):
        return MatrixFormat(*FLOAT_MODES[width], "U8", width)
    return MatrixFormat(width, _GROUP_SIZE, "BF16")


@dataclass(frozen=True)
class _StackedTensors:
    """Experts stored by component, as in published checkpoints, in two files for each layer."""

    folder: Path
    layout: LayerLayouts
    starts: Mapping[tuple[int, str], tuple[Path, int]]
    num_layers: int = LAYERS
    num_experts: int = EXPERTS

    def extents(self, layer: int, expert: int) -> list[Extent]:
        found = []
        for component in self.layout[layer].components:
            path, start = self.starts[layer, component.name]
            found.append(Extent(path, start + expert * component.nbytes, component.nbytes))
        return found


def _write_tensors(folder: Path, layout: LayerLayouts, payloads: Mapping[tuple[int, int], bytes]) -> _StackedTensors:
    starts: dict[tuple[int, str], tuple[Path, int]] = {}
    for layer in range(LAYERS):
        every = layout[layer].components
        for number, components in enumerate((every[:5], every[5:])):
            path = folder / f"model-{layer}-{number}.safetensors"
            content = b"header "  # an odd length: checkpoints do not align tensors
            for component in components:
                starts[layer, component.name] = (path, len(content))
                begin, end = component.offset, component.offset + component.nbytes
                content += b"".join(payloads[layer, expert][begin:end] for expert in range(EXPERTS))
            path.write_bytes(content)
    return _StackedTensors(folder, layout, starts)
