"""The format of a pack: its manifest, the names of its files, and the place of each record.

A pack is a directory with a model ready to run. Its manifest, ``pack.json``, is written last, so a directory without a
manifest is an unfinished pack::

    {"format": "flashmoe-pack", "format_version": 1,
     "source": {"name": ..., "revision": ...},        where it came from, for people
     "geometry": {"num_layers": ..., "num_experts": ..., "hidden_size": ..., "expert_size": ...},
     "variants": {"q4": {"bits": 4, "group_size": 64, "dtype": "BF16", "record_bytes": ..., "components": [...]},
                  "q2": {"bits": 2, "quantiser": "least_squares", ...}},
     "files": {"config.json": {"bytes": ..., "xxh3": "..."}, "experts-q4/layer_00.bin": {"bytes": ...}, ...},
     "skipped_tensors": [...]}

The name of a variant is its width, followed by its quantizer if that is not the default of the width (``q2-minmax``).
A variant of copied records has no quantizer. Format version 2 adds variants of several formats. Such an entry has a
list of record layouts and the number of the layout of each layer; a layout in which projections differ has a format for
each projection::

    "mixed-3.33": {"layouts": [{"gate": {"bits": 3, "group_size": 64, "dtype": "BF16"}, "up": {...}, "down": {...},
                                "record_bytes": ..., "components": [...]}],
                   "layers": [0, 0, 0, ...], "quantiser": "by_width"}

Format version 3 adds packs with the share of one of several nodes: ``"share": {"node": 0, "weights": [1.0, 1.0]}``. The
layer files and the checksums of such a pack hold only the experts that ``formats.shares`` gives to this node.

A pack of a checkpoint in FP8, GPTQ or AWQ states the relative error of its weights by projection, as a mean over the
experts or matrices and the worst of them::

    "requantization_error": {"q4": {"gate": {"mean": 0.083, "worst": 0.086}, ...},
                             "resident": {"q_proj": {"mean": ..., "worst": ...}, ...}}

A format in one of MLX's float modes has a "mode", and such a variant has the name of the mode ("mxfp4"). A pack whose
variants have one affine format each has version 1.

``experts-<variant>/layer_NN.bin`` holds the records of a layer in the order of the experts and nothing else.
``experts-<variant>/checksums.xxh3`` holds a little-endian 64-bit XXH3 hash for each record, by layer, then expert.
Layer files have no hash in the manifest, because each of their records has one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from flashmoe_mlx.formats.extents import Extent, read_extents
from flashmoe_mlx.formats.record import LayerLayouts
from flashmoe_mlx.formats.shares import Share

__all__ = [
    "CHECKSUMS",
    "FORMAT",
    "FORMAT_VERSION",
    "HASH_BYTES",
    "MANIFEST",
    "MIXED_FORMAT_VERSION",
    "RESIDENT",
    "SHARE_FORMAT_VERSION",
    "TEXT_FILES",
    "PackedExperts",
    "file_hash",
    "layer_file",
    "variant_directory",
]

MANIFEST = "pack.json"

RESIDENT = "resident.safetensors"

CHECKSUMS = "checksums.xxh3"

HASH_BYTES = 8

FORMAT = "flashmoe-pack"

FORMAT_VERSION = 1
MIXED_FORMAT_VERSION = 2
"""The version of packs with a variant of several formats or in a float mode, which earlier programs cannot read."""
SHARE_FORMAT_VERSION = 3
"""The version of packs with the experts of one node alone."""

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files that a pack copies from the checkpoint if they exist there."""


@dataclass(frozen=True)
class PackedExperts:
    """The records of one variant of a pack, as a source for stores.

    Attributes:
        directory: the folder of the variant.
        layout: the layout of the records of each layer with experts.
        num_experts: number of experts in each layer.
        quantizer: the quantizer of the variant; None if its records were copied.
        packed: the share whose experts the files hold; None for all experts.
    """

    directory: Path
    layout: LayerLayouts
    num_experts: int
    quantizer: str | None = None
    packed: Share | None = None

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layout)

    def layer_path(self, layer: int) -> Path:
        """Return the path of the file with the records of ``layer``."""
        return self._layer_paths[layer]

    @cached_property
    def _layer_paths(self) -> list[Path]:
        """The paths of all layer files. Joining one takes microseconds, and every fetch needs several."""
        return [self.directory / layer_file(layer) for layer in range(self.num_layers)]

    def packed_in(self, layer: int) -> Sequence[int]:
        """Return the experts in the file of ``layer``, in the order of their records."""
        return range(self.num_experts) if self.packed is None else self.packed.experts(layer, self.num_experts)

    def layer_bytes(self, layer: int) -> int:
        """Return the size of the file of ``layer`` in bytes."""
        return len(self.packed_in(layer)) * self.layout[layer].record_bytes

    def copy_in(self, folder: Path) -> "PackedExperts":
        """Return the place of a copy of these records in ``folder``, which is a mirror of the pack."""
        return replace(self, directory=folder / self.directory.name)

    def extents(self, layer: int, expert: int) -> list[Extent]:
        """Return the place of the record of ``expert``, including its padding."""
        size = self.layout[layer].record_bytes
        return [Extent(self.layer_path(layer), self.place(layer, expert) * size, size)]

    def place(self, layer: int, expert: int) -> int:
        """Return the number of records before that of ``expert`` in the file of ``layer``."""
        return expert if self.packed is None else self.packed.place(layer, self.num_experts, expert)

    def payload(self, layer: int, expert: int) -> bytearray:
        """Read the record of ``expert``."""
        return read_extents(self.extents(layer, expert))

    def exact(self, layer: int, expert: int) -> Mapping[str, npt.NDArray[np.float32]]:  # noqa: ARG002  # see RecordSource
        """Return an empty mapping: a pack has no codes of other packages."""
        return {}


def layer_file(layer: int) -> str:
    """Return the name of the file of a layer, which is the same in flash-moe."""
    return f"layer_{layer:02d}.bin"


def variant_directory(name: str) -> str:
    """Return the name of the folder of a variant inside its pack."""
    return f"experts-{name}"


def file_hash(path: Path) -> str:
    """Return the XXH3 hash of a whole file, as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(4 * 2**20):
            digest.update(block)
    return digest.hexdigest()
