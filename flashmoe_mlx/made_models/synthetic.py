"""Packs of models with random weights: real record sizes and any number of layers, without a download.

Weights have mean zero, so the router's choices depend on the token and are spread over all experts. Every code is drawn
at random, so no storage or filesystem can compress the records.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.formats.files import publish, write_atomically
from flashmoe_mlx.formats.folders import check_free_space, explain_write_errors, lock_folder
from flashmoe_mlx.formats.manifest import CHECKSUMS, MANIFEST, RESIDENT, layer_file, variant_directory
from flashmoe_mlx.formats.record import LayerLayouts, RecordLayout
from flashmoe_mlx.made_models.byte_tokenizer import BYTE_TOKENS, write_byte_tokenizer
from flashmoe_mlx.made_models.synthetic_sizes import SyntheticSizes
from flashmoe_mlx.models.parameters import EMBEDDING, HEAD, Kind, Parameter
from flashmoe_mlx.models.registry import named_family, parse_config
from flashmoe_mlx.pack.layer_file import write_layer_file
from flashmoe_mlx.pack.manifest import variant_name, write_manifest
from flashmoe_mlx.pack.opening import Pack, open_pack
from flashmoe_mlx.pack.progress import Progress, Silent

FAMILY = "qwen3_5_moe"
"""The family of a synthetic model unless another is asked for."""
_GROUP_SIZE = 64
_RECIPE = 1
"""The version of the weights that a seed gives; a cached pack of an older recipe is not used."""


def synthetic_pack(
    name: str, sizes: SyntheticSizes, cache_dir: Path, progress: Progress | None = None, family: str = FAMILY
) -> Pack:
    """Open the pack of these sizes under ``cache_dir``; make it first if it does not exist.

    Args:
        name: the beginning of the folder's name, and the name of the source in the manifest.
        sizes: the sizes of the model.
        cache_dir: the folder with all synthetic packs.
        progress: shows the progress.
        family: a ``model_type`` of the family; sizes that it lacks have no effect.

    Raises:
        PackError: there is no space, or another process is making the pack.
        CheckpointError: no model has these sizes.
        InputError: there is no such family; code "unknown_family".
    """
    recipe = [_RECIPE, asdict(sizes), *([] if family == FAMILY else [family])]  # packs made before families had names
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
    folder = cache_dir / f"{name}-{digest}"
    if not (folder / MANIFEST).is_file():
        with explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with lock_folder(folder):
                _Synthesizer(sizes, folder, progress or Silent(), family).write(name)
    return open_pack(folder)


def synthetic_config(sizes: SyntheticSizes, family: str = FAMILY, vocab_size: int = BYTE_TOKENS) -> dict[str, Any]:
    """Return the ``config.json`` of a synthetic model; see ``synthetic_pack``."""
    return named_family(family).write_config({**asdict(sizes), "vocab_size": vocab_size})


class _Synthesizer:
    def __init__(self, sizes: SyntheticSizes, folder: Path, progress: Progress, family: str) -> None:
        self._sizes = sizes
        self._folder = folder
        self._progress = progress
        self._vocab_size = write_byte_tokenizer(folder)
        published = synthetic_config(sizes, family, self._vocab_size)
        self._config = parse_config(published)
        self._layout = RecordLayout.uniform(sizes.hidden_size, sizes.expert_size, sizes.bits, _GROUP_SIZE, "BF16")
        write_atomically(folder / "config.json", json.dumps(published, indent=1).encode())

    def write(self, name: str) -> None:
        needed = len(self._config.moe_layers) * self._config.num_experts * self._layout.record_bytes
        check_free_space(
            self._folder, needed, "choose fewer layers (model.synthetic.num_layers) or another model.cache_dir"
        )
        self._write_resident()
        variant = variant_name(self._sizes.bits)
        self._write_experts(self._folder / variant_directory(variant))
        source = {"name": f"{name} (random weights)", "revision": f"recipe {_RECIPE}, seed {self._sizes.seed}"}
        layout = LayerLayouts.uniform(self._layout, len(self._config.moe_layers))
        write_manifest(self._folder, self._config, {variant: layout}, source, [])

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self._sizes.seed, *stream])

    def _write_resident(self) -> None:
        tensors: dict[str, mx.array] = {}
        for index, parameter in enumerate(self._config.resident_parameters()):
            tensors |= _resident_tensors(parameter, self._sizes.bits, self._random(0, index))
        for index, table in enumerate(self._config.tables):
            values = self._random(2, index).normal(0, 1, (table.rows, table.columns)).astype(np.float32)
            tensors[f"{table.name}.weight"] = mx.array(values).astype(mx.bfloat16)
        partial = self._folder / f"partial-{RESIDENT}"
        with partial.open("wb") as file:  # given a name, MLX hides the reason why it cannot write
            mx.save_safetensors(file, tensors, {"format": "mlx"})
        publish(partial, self._folder / RESIDENT)

    def _write_experts(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        digests: list[int] = []
        for layer in range(len(self._config.moe_layers)):
            total = self._config.num_experts * self._layout.record_bytes
            self._progress.stage(f"random experts, layer {layer + 1} of {len(self._config.moe_layers)}", total)
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
                    continue  # written together with the scales before them
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
        bits = max(bits, parameter.least_bits)
        codes = np.frombuffer(random.bytes(rows * columns * bits // 8), "<u4").reshape(rows, -1)
        # Rows of the embedding have unit variance; logits of the head differ enough for choices to be clear.
        gain = {EMBEDDING: math.sqrt(columns), HEAD: 2.0}.get(name, parameter.gain)
        scales, biases = _scales((rows, columns // _GROUP_SIZE), columns, bits, random, gain)
        return {
            f"{name}.weight": mx.array(codes),
            f"{name}.scales": mx.array(scales).view(mx.bfloat16),
            f"{name}.biases": mx.array(biases).view(mx.bfloat16),
        }
    values = np.ones(shape) if parameter.draw is None else parameter.draw(random, shape)
    return {name: mx.array(values.astype(np.float32)).astype(mx.bfloat16)}


def _scales(
    shape: tuple[int, ...], columns: int, bits: int, random: np.random.Generator, gain: float = 1.0
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """Draw scales and biases that give weights with uniform codes a mean of 0.

    Args:
        shape: [rows, groups] of the scales.
        columns: the weights of a row; their standard deviation is about gain / sqrt(columns).
        bits: the width of the codes.
        random: the generator.
        gain: see ``columns``.

    Returns:
        The bits of the bf16 scales and biases.
    """
    most = 2**bits - 1
    deviation = math.sqrt((most * (most + 2)) / 12)  # of a uniform code
    scales = random.uniform(0.5, 1.5, shape) * gain / deviation / math.sqrt(columns)
    coarse = _bf16(scales.astype(np.float32))
    exact = (coarse.astype(np.uint32) << 16).view(np.float32)
    return coarse, _bf16(-exact * np.float32(most / 2))


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the upper halves of float32 words; rounding does not matter for random numbers."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)
