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
A variant of copied records has no quantizer. ``experts-<variant>/layer_NN.bin`` holds the records of a layer in the
order of the experts and nothing else. ``experts-<variant>/checksums.xxh3`` holds a little-endian 64-bit XXH3 hash for
each record, by layer, then expert. Layer files have no hash in the manifest, because each of their records has one.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import xxhash

from flashmoe_mlx.formats.extents import Extent
from flashmoe_mlx.formats.record import RecordLayout

MANIFEST = "pack.json"

RESIDENT = "resident.safetensors"

CHECKSUMS = "checksums.xxh3"

HASH_BYTES = 8

FORMAT = "flashmoe-pack"

FORMAT_VERSION = 1

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
        layout: the layout of every record.
        num_layers: number of layers with experts.
        num_experts: number of experts in each layer.
        quantizer: the quantizer of the variant; None if its records were copied.
    """

    directory: Path
    layout: RecordLayout
    num_layers: int
    num_experts: int
    quantizer: str | None = None

    def layer_path(self, layer: int) -> Path:
        """Return the path of the file with the records of ``layer``."""
        return self._layer_paths[layer]

    @cached_property
    def _layer_paths(self) -> list[Path]:
        """The paths of all layer files. Joining one takes microseconds, and every fetch needs several."""
        return [self.directory / layer_file(layer) for layer in range(self.num_layers)]

    @property
    def layer_bytes(self) -> int:
        """Size of a layer file in bytes."""
        return self.num_experts * self.layout.record_bytes

    def copy_in(self, folder: Path) -> "PackedExperts":
        """Return the place of a copy of these records in ``folder``, which is a mirror of the pack."""
        return replace(self, directory=folder / self.directory.name)

    def extents(self, layer: int, expert: int) -> list[Extent]:
        """Return the place of the record of ``expert``, including its padding."""
        size = self.layout.record_bytes
        return [Extent(self.layer_path(layer), expert * size, size)]


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
