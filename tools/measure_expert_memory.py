"""Measure the peak memory of models whose experts have 8 GB, through the native kernels and through mlx-lm.

    python tools/measure_expert_memory.py [--folder <folder>] [model:backend ...]

Writes a Qwen3-MoE and, if mlx-lm is installed, an OLMoE, with 18 layers of 128 experts in 4 bits, as MLX conversions:
random resident weights, and experts of zeros, which take no room on most disks. Each run is a separate process. The
files are deleted at the end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import flashmoe_mlx
from flashmoe_mlx.pack.writer import pack_checkpoint

LAYERS, EXPERTS, HIDDEN, SIZE, VOCABULARY, GROUP, HEADS = 18, 128, 2048, 1024, 32000, 64, 16
COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": SIZE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "quantization": {"group_size": GROUP, "bits": 4},
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": COMMON | {"moe_intermediate_size": SIZE, "head_dim": HIDDEN // HEADS},
    "olmoe": COMMON,
}
PROMPT, STEPS = 12, 3
RUNS = (
    "qwen3_moe:checkpoint", "qwen3_moe:pread", "qwen3_moe:ram_hybrid", "qwen3_moe:mmap",
    "olmoe:checkpoint", "olmoe:pread", "olmoe:ram_hybrid",
)  # fmt: skip
PACKED = "mmap"
"""The backend that needs a pack."""


def resident_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the resident tensors, dense."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    norm = HIDDEN // HEADS if model == "qwen3_moe" else HIDDEN
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        found |= {f"{prefix}self_attn.{part}_norm.weight": (norm,) for part in "qk"}
        found |= {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        found[f"{prefix}mlp.gate.weight"] = (EXPERTS, HIDDEN)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_checkpoint(folder: Path, model: str) -> tuple[int, int]:
    """Write a checkpoint; return the bytes of its experts and of its resident weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[model] | {"model_type": model}))
    header: dict[str, Any] = {}
    end = 0

    def place(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        nonlocal end
        size = int(np.prod(shape)) * (4 if dtype == "U32" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size

    def place_matrix(name: str, *shape: int) -> None:
        *outer, columns = shape
        place(f"{name}.weight", "U32", (*outer, columns // 8))
        for part in ("scales", "biases"):
            place(f"{name}.{part}", "BF16", (*outer, columns // GROUP))

    for name, shape in resident_shapes(model).items():
        if len(shape) == 1:
            place(name, "BF16", shape)
        else:
            place_matrix(name.removesuffix(".weight"), *shape)
    resident, names = end, list(header)
    for layer in range(LAYERS):
        for part in ("gate", "up", "down"):
            rows, columns = (HIDDEN, SIZE) if part == "down" else (SIZE, HIDDEN)
            place_matrix(f"model.layers.{layer}.mlp.switch_mlp.{part}_proj", EXPERTS, rows, columns)
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    scale = np.float32(0.2 * HIDDEN**-0.5)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            count = int(np.prod(header[name]["shape"]))
            if header[name]["dtype"] == "U32":
                file.write(random.integers(0, 2**32, count, np.uint32).tobytes())
            else:
                value = scale if name.endswith("scales") else -7.5 * scale if name.endswith("biases") else 1.0
                word = int(np.float32(value).view(np.uint32)) >> 16
                file.write(np.full(count, word, np.uint16).tobytes())
        file.truncate(8 + len(text) + end)
    return end - resident, resident


class PeakMemory:
    """The largest memory of this process beside the page cache, sampled every 5 ms."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.is_set():
            lines = Path("/proc/self/status").read_text().splitlines()
            values = (int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))
            self.peak = max(self.peak, 1024 * sum(values))
            time.sleep(0.005)


def run(folder: Path, backend: str) -> None:
    """Run a prompt and some steps; print the peak of the memory beside the page cache."""
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, PROMPT + STEPS).tolist()
    options: dict[str, Any] = {"budget_gib": 0.5} if backend == "ram_hybrid" else {}
    with PeakMemory() as memory, flashmoe_mlx.load(folder, backend, **options) as engine:
        cache = engine.new_cache()
        engine.forward(tokens[:PROMPT], cache)
        for token in tokens[PROMPT:]:
            engine.forward([token], cache)
        total = engine.store.stats()
    print(
        f"{folder.name:16} {backend:10} peak {memory.peak / 1e9:.2f} GB beside the page cache; "
        f"{total.misses} experts, {total.bytes_read / 1e9:.1f} GB read",
        flush=True,
    )


def main() -> None:
    """Write the models, run each, and delete them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=RUNS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", nargs=2)
    arguments = parser.parse_args()
    if arguments.one:
        run(Path(arguments.one[0]), arguments.one[1])
        return
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        for model in MODELS:
            backends = [own.partition(":")[2] for own in arguments.runs if own.partition(":")[0] == model]
            if not backends or (model == "olmoe" and find_spec("mlx_lm") is None):
                continue
            experts, resident = write_checkpoint(folder / model, model)
            print(f"{model}: experts {experts / 1e9:.2f} GB, resident weights {resident / 1e9:.2f} GB", flush=True)
            for backend in backends:
                source = folder / model
                if backend == PACKED:
                    source = folder / f"{model}-pack"
                    pack_checkpoint(folder / model, source, 4)
                command = [sys.executable, __file__, "--one", str(source), backend]
                subprocess.run(command, check=True)  # noqa: S603
                if backend == PACKED:
                    shutil.rmtree(source)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
