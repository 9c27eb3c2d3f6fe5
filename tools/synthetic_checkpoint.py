"""Convert a pack to the layout of a published checkpoint, to measure backend=checkpoint without a download.

    python tools/synthetic_checkpoint.py <pack> <folder>

The experts become stacked tensors [experts, ...] as in a quantized mlx-community conversion, one shard per layer.
The resident weights are a hard link to the file of the pack. The checkpoint takes as much space as the pack.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from flashmoe_mlx.formats.manifest import PackedExperts
from flashmoe_mlx.formats.record import DTYPE_BYTES
from flashmoe_mlx.pack.opening import open_pack


def main(pack_folder: Path, out: Path) -> None:
    """Write the checkpoint to the new folder ``out``."""
    pack = open_pack(pack_folder)
    experts = max(pack.experts.values(), key=lambda variant: variant.layout.code_bits)
    out.mkdir()
    shutil.copy(pack.folder / "config.json", out)
    os.link(pack.resident_path, out / "model-resident.safetensors")
    for layer in range(experts.num_layers):
        write_layer(experts, layer, out / f"model-layer-{layer:02d}.safetensors")


def write_layer(experts: PackedExperts, layer: int, path: Path) -> None:
    """Write the shard of one layer. Format: https://github.com/huggingface/safetensors#format."""
    header, end = {}, 0
    for component in experts.layout[layer].components:
        projection, part = component.name.split(".")
        nbytes = component.nbytes * experts.num_experts
        assert nbytes // experts.num_experts % DTYPE_BYTES[component.dtype] == 0
        header[f"model.layers.{layer}.mlp.switch_mlp.{projection}_proj.{part}"] = {
            "dtype": component.dtype,
            "shape": [experts.num_experts, *component.shape],
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    records = np.memmap(experts.layer_path(layer), np.uint8, "r").reshape(experts.num_experts, -1)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for component in experts.layout[layer].components:
            for record in records:
                file.write(record[component.offset : component.offset + component.nbytes].tobytes())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
