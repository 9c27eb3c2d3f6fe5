"""Random experts on disk, and the bytes that a store must serve."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmoe_mlx.formats.extents import ExpertSource, Extent
from flashmoe_mlx.formats.manifest import PackedExperts
from flashmoe_mlx.formats.record import RecordLayout

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


def write_experts(folder: Path, bits: int, contiguous: bool) -> StoredExperts:
    """Write random experts of ``bits`` bits into ``folder``.

    An expert is one piece, as in a pack, if ``contiguous``, and otherwise nine pieces, as in a quantized checkpoint.
    """
    layout = RecordLayout(_SIZE, _SIZE, bits, _GROUP_SIZE, "BF16")
    random = np.random.default_rng(bits)
    payloads = {(n, e): random.bytes(layout.payload_bytes) for n in range(LAYERS) for e in range(EXPERTS)}
    if not contiguous:
        return StoredExperts(_write_tensors(folder, layout, payloads), payloads)
    source = PackedExperts(folder, layout, LAYERS, EXPERTS)
    records = {place: payload.ljust(layout.record_bytes, b"\0") for place, payload in payloads.items()}
    for layer in range(LAYERS):
        source.layer_path(layer).write_bytes(b"".join(records[layer, expert] for expert in range(EXPERTS)))
    return StoredExperts(source, records)


@dataclass(frozen=True)
class _StackedTensors:
    """Experts stored by component, as in published checkpoints, in two files for each layer."""

    folder: Path
    layout: RecordLayout
    starts: Mapping[tuple[int, str], tuple[Path, int]]
    num_layers: int = LAYERS
    num_experts: int = EXPERTS

    def extents(self, layer: int, expert: int) -> list[Extent]:
        found = []
        for component in self.layout.components:
            path, start = self.starts[layer, component.name]
            found.append(Extent(path, start + expert * component.nbytes, component.nbytes))
        return found


def _write_tensors(folder: Path, layout: RecordLayout, payloads: Mapping[tuple[int, int], bytes]) -> _StackedTensors:
    starts: dict[tuple[int, str], tuple[Path, int]] = {}
    for layer in range(LAYERS):
        for number, components in enumerate((layout.components[:5], layout.components[5:])):
            path = folder / f"model-{layer}-{number}.safetensors"
            content = b"header "  # an odd length: checkpoints do not align tensors
            for component in components:
                starts[layer, component.name] = (path, len(content))
                begin, end = component.offset, component.offset + component.nbytes
                content += b"".join(payloads[layer, expert][begin:end] for expert in range(EXPERTS))
            path.write_bytes(content)
    return _StackedTensors(folder, layout, starts)
