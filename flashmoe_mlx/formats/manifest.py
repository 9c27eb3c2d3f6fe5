"""The parts of a pack: the names of its files, and the place of each record.

A pack is a directory with a model ready to run. ``pack.json`` is the manifest and is written last, so a directory
without it is an unfinished pack::

    {"format": "flashmoe-pack", "format_version": 1,
     "source": {"name": ..., "revision": ...},        where it came from, for people
     "geometry": {"num_layers": ..., "num_experts": ..., "hidden_size": ..., "expert_size": ...},
     "variants": {"q4": {"bits": 4, "group_size": 64, "dtype": "BF16", "record_bytes": ..., "components": [...]},
                  "q2": {"bits": 2, "quantiser": "least_squares", ...}},
     "files": {"config.json": {"bytes": ..., "xxh3": "..."}, "experts-q4/layer_00.bin": {"bytes": ...}, ...},
     "skipped_tensors": [...]}

A variant is named after its width, and after its quantizer where that is not the default of the width (``q2-minmax``).
A variant whose records are copies of published ones names no quantizer. ``experts-<variant>/layer_NN.bin`` holds the
records of a layer in the order of the experts and nothing else; ``experts-<variant>/checksums.xxh3`` holds one
little-endian 64-bit XXH3 hash for each record, by layer, then expert. Layer files have no hash in the manifest, because
each of their records has one.
"""

from dataclasses import dataclass
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
"""Files that are copied from the checkpoint where it has them."""


@dataclass(frozen=True)
class PackedExperts:
    """The records of one variant of a pack, as a source for stores; ``quantiser`` made them, if they are not copies."""

    directory: Path
    layout: RecordLayout
    num_layers: int
    num_experts: int
    quantiser: str | None = None

    def layer_path(self, layer: int) -> Path:
        """The file that holds the records of ``layer``."""
        return self.directory / layer_file(layer)

    @property
    def layer_bytes(self) -> int:
        """Size of every layer file."""
        return self.num_experts * self.layout.record_bytes

    def extents(self, layer: int, expert: int) -> list[Extent]:
        """Locate the expert's record, padding included."""
        size = self.layout.record_bytes
        return [Extent(self.layer_path(layer), expert * size, size)]


def layer_file(layer: int) -> str:
    """Return the name of a layer's file, which is flash-moe's."""
    return f"layer_{layer:02d}.bin"


def variant_directory(name: str) -> str:
    """Return the folder of a variant inside its pack."""
    return f"experts-{name}"


def file_hash(path: Path) -> str:
    """Return the XXH3 hash of a whole file, as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(4 * 2**20):
            digest.update(block)
    return digest.hexdigest()
