"""Packs of models with random weights: the real record sizes and as many layers as wanted, without any download.

Weights have mean zero, so the router's choices depend on the token and are spread over all experts. Every code is drawn
at random, so no storage or filesystem can compress what it should read.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.formats.files import publish, write_atomically
from flashmoe_mlx.formats.folders import check_free_space, explain_write_errors, lock_folder
from flashmoe_mlx.formats.manifest import CHECKSUMS, MANIFEST, RESIDENT, layer_file, variant_directory
from flashmoe_mlx.formats.record import RecordLayout
from flashmoe_mlx.made_models.byte_tokenizer import BYTE_TOKENS, write_byte_tokenizer
from flashmoe_mlx.made_models.synthetic_sizes import SyntheticSizes
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.models.parameters import Kind, Parameter, least_bits, resident_parameters
from flashmoe_mlx.pack.layer_file import write_layer_file
from flashmoe_mlx.pack.manifest import variant_name, write_manifest
from flashmoe_mlx.pack.opening import Pack, open_pack
from flashmoe_mlx.pack.progress import Progress, Silent

_GROUP_SIZE = 64
_RECIPE = 1
"""Counts changes of what is drawn from a seed, so that packs of older recipes are not taken for new ones."""


def synthetic_pack(name: str, sizes: SyntheticSizes, cache_dir: Path, progress: Progress | None = None) -> Pack:
    """Open the pack of these sizes under ``cache_dir``, making it first if there is none.

    Raises:
        PackError: no room for it, or another process is making it.
        CheckpointError: the sizes do not make a model.
    """
    digest = hashlib.sha256(json.dumps([_RECIPE, asdict(sizes)]).encode()).hexdigest()[:8]
    folder = cache_dir / f"{name}-{digest}"
    if not (folder / MANIFEST).is_file():
        with explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with lock_folder(folder):
                _Synthesiser(sizes, folder, progress or Silent()).write(name)
    return open_pack(folder)


def synthetic_config(sizes: SyntheticSizes, vocab_size: int = BYTE_TOKENS) -> dict[str, object]:
    """Return the ``config.json`` of a synthetic model."""
    return {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "full_attention_interval": 4,
        "linear_num_key_heads": sizes.linear_key_heads,
        "linear_num_value_heads": sizes.linear_value_heads,
        "linear_key_head_dim": sizes.linear_key_dim,
        "linear_value_head_dim": sizes.linear_value_dim,
        "num_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.experts_per_token,
        "moe_intermediate_size": sizes.expert_size,
        "shared_expert_intermediate_size": sizes.shared_expert_size,
        "max_position_embeddings": sizes.max_context,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    }


class _Synthesiser:
    def __init__(self, sizes: SyntheticSizes, folder: Path, progress: Progress) -> None:
        self._sizes = sizes
        self._folder = folder
        self._progress = progress
        self._vocab_size = write_byte_tokenizer(folder)
        published = synthetic_config(sizes, self._vocab_size)
        self._config = ModelConfig.from_json(published)
        self._layout = RecordLayout(sizes.hidden_size, sizes.expert_size, sizes.bits, _GROUP_SIZE, "BF16")
        write_atomically(folder / "config.json", json.dumps(published, indent=1).encode())

    def write(self, name: str) -> None:
        needed = self._config.num_layers * self._config.num_experts * self._layout.record_bytes
        check_free_space(
            self._folder, needed, "choose fewer layers (model.synthetic.num_layers) or another model.cache_dir"
        )
        self._write_resident()
        variant = variant_name(self._sizes.bits)
        self._write_experts(self._folder / variant_directory(variant))
        source = {"name": f"{name} (random weights)", "revision": f"recipe {_RECIPE}, seed {self._sizes.seed}"}
        write_manifest(self._folder, self._config, {variant: self._layout}, source, [])

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self._sizes.seed, *stream])

    def _write_resident(self) -> None:
        tensors: dict[str, mx.array] = {}
        for index, parameter in enumerate(resident_parameters(self._config)):
            tensors |= _resident_tensors(parameter, self._sizes.bits, self._random(0, index))
        partial = self._folder / f"partial-{RESIDENT}"
        with partial.open("wb") as file:  # with a name alone MLX does not say why it cannot write
            mx.save_safetensors(file, tensors, {"format": "mlx"})
        publish(partial, self._folder / RESIDENT)

    def _write_experts(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        digests: list[int] = []
        for layer in range(self._config.num_layers):
            total = self._config.num_experts * self._layout.record_bytes
            self._progress.stage(f"random experts, layer {layer + 1} of {self._config.num_layers}", total)
            for report in write_layer_file(directory / layer_file(layer), self._records(layer), self._layout):
                digests.append(report.digest)
                self._progress.advance(self._layout.record_bytes)
        write_atomically(directory / CHECKSUMS, np.array(digests, "<u8").tobytes())

    def _records(self, layer: int) -> Iterator[memoryview]:
        random = self._random(1, layer)
        for _ in range(self._config.num_experts):
            record = memoryview(bytearray(self._layout.record_bytes))
            for component in self._layout.components:
                projection, part = component.name.split(".")
                if part == "biases":
                    continue  # written with the scales, which they follow
                _, columns = self._layout.projection_shape(projection)
                start, end = component.offset, component.offset + component.nbytes
                if part == "weight":
                    record[start:end] = random.bytes(component.nbytes)
                else:
                    scales, biases = _scales(component.shape, columns, self._sizes.bits, random)
                    record[start:end] = scales.tobytes()
                    record[end : end + component.nbytes] = biases.tobytes()
            yield record


def _resident_tensors(parameter: Parameter, bits: int, random: np.random.Generator) -> dict[str, mx.array]:
    name, shape = parameter.name, parameter.shape
    if parameter.kind is Kind.MATRIX:
        rows, columns = shape
        if columns % _GROUP_SIZE:
            dense = random.normal(0, columns**-0.5, shape).astype(np.float32)
            return {f"{name}.weight": mx.array(dense).astype(mx.bfloat16)}
        router = name.endswith(".mlp.gate")
        bits = least_bits(name, bits)
        codes = np.frombuffer(random.bytes(rows * columns * bits // 8), "<u4").reshape(rows, -1)
        # Logits of router and head must differ enough for choices to be clear.
        gain = 2.0 if router or name == "lm_head" else 1.0
        if name == "model.embed_tokens":
            gain = math.sqrt(columns)
        scales, biases = _scales((rows, columns // _GROUP_SIZE), columns, bits, random, gain)
        return {
            f"{name}.weight": mx.array(codes),
            f"{name}.scales": mx.array(scales).view(mx.bfloat16),
            f"{name}.biases": mx.array(biases).view(mx.bfloat16),
        }
    if parameter.kind is Kind.CONV:
        values = random.normal(0, 0.5, shape)
    elif name.endswith("A_log"):
        values = np.log(random.uniform(0.5, 16, shape))
    elif name.endswith("dt_bias"):
        values = random.uniform(-6, -1, shape)
    else:
        values = np.ones(shape)
    return {name: mx.array(values.astype(np.float32)).astype(mx.bfloat16)}


def _scales(
    shape: tuple[int, int], columns: int, bits: int, random: np.random.Generator, gain: float = 1.0
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """Scales and biases, the bits of bf16, that give uniform codes mean 0 and deviation gain / sqrt(columns) about."""
    most = 2**bits - 1
    deviation = math.sqrt((most * (most + 2)) / 12)  # of a uniform code
    scales = random.uniform(0.5, 1.5, shape) * gain / deviation / math.sqrt(columns)
    coarse = _bf16(scales.astype(np.float32))
    exact = (coarse.astype(np.uint32) << 16).view(np.float32)
    return coarse, _bf16(-exact * np.float32(most / 2))


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of float32 words: rounding does not matter for random numbers."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)
