"""Measure the peak memory of packing: write a bf16 checkpoint with the shapes of the 397B, and pack it.

    python tools/measure_pack_memory.py <empty folder on a disk with 15 GB free> [layers] [experts]

The checkpoint has the vocabulary and the expert size of the 397B, so its largest tensors have the same size.
"""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from flashmoe_mlx.models.parameters import Kind
from flashmoe_mlx.models.registry import parse_config

PACK = [sys.executable, "-m", "flashmoe_mlx", "task=pack"]


def published_config(layers: int, experts: int) -> dict[str, object]:
    """Return the config.json of Qwen3.5-397B-A17B with fewer layers and experts."""
    return {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": 248320,
        "hidden_size": 4096,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "full_attention_interval": 2,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 64,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": experts,
        "num_experts_per_tok": min(10, experts),
        "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
        "max_position_embeddings": 262144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    }


def write_checkpoint(folder: Path, config: dict[str, object]) -> int:
    """Write one safetensors file of random bf16 weights in Hugging Face's fused layout; return its size in bytes."""
    model = parse_config(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in model.resident_parameters():
        rows, *rest = parameter.shape
        name = f"{parameter.name}.weight" if parameter.kind is Kind.MATRIX else parameter.name
        shapes[name] = (rows, 1, rest[0]) if parameter.kind is Kind.CONV else parameter.shape
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        shapes[f"{prefix}gate_up_proj"] = (model.num_experts, 2 * model.expert_size, model.hidden_size)
        shapes[f"{prefix}down_proj"] = (model.num_experts, model.hidden_size, model.expert_size)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    # Repeat a block of finite bf16 numbers between -1 and 1.
    block = (
        (np.random.default_rng(0).uniform(-1, 1, 2**22).astype(np.float32).view(np.uint32) >> 16)
        .astype("<u2")
        .tobytes()
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])
    return end


def main() -> None:
    """Write the checkpoint, pack it, print the peak memory, and delete both."""
    work = Path(sys.argv[1])
    layers, experts = map(int, sys.argv[2:4]) if len(sys.argv) > 3 else (2, 64)
    size = write_checkpoint(work / "checkpoint", published_config(layers, experts))
    command = [
        *PACK,
        f"source={work / 'checkpoint'}",
        f"out={work / 'pack'}",
        "bits=[4,2]",
        f"hydra.run.dir={work / 'run'}",
    ]
    subprocess.run(command, check=True)  # noqa: S603  # runs this package
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    print(f"checkpoint {size / 1e9:.2f} GB, {layers} layers, {experts} experts: packing peaked at {peak / 1e6:.0f} MB")
    shutil.rmtree(work / "checkpoint")
    shutil.rmtree(work / "pack")


if __name__ == "__main__":
    main()
