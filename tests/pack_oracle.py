"""The expected content of a pack of a tiny checkpoint, computed from the safetensors files alone."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tiny_checkpoints import GEOMETRIES, Geometry, Layout

Stored = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Tensors by name: safetensors type, shape, bytes."""

SMALL = replace(GEOMETRIES["tied"], layer_types="LF", experts=4, top_k=2)
"""A geometry that is packed in a tenth of a second."""

_ALIGNMENT = 16384
_MLX = {"U32": mx.uint32, "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


def read_safetensors(path: Path) -> Stored:
    """Return all tensors of a file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), data[start + begin : start + end])
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def read_checkpoint(folder: Path) -> Stored:
    """Return all tensors of all shards."""
    found: Stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= read_safetensors(path)
    return found


def as_array(dtype: str, shape: tuple[int, ...], data: bytes) -> mx.array:
    """Return a stored tensor as an MLX array."""
    return mx.array(np.frombuffer(data, np.uint8)).view(_MLX[dtype]).reshape(shape)


def raw(array: mx.array) -> bytes:
    """Return the bytes of an array."""
    return np.array(mx.contiguous(array).view(mx.uint8)).tobytes()


def quantized(dense: mx.array, bits: int, group_size: int) -> list[mx.array]:
    """Return codes, scales, and biases of the whole tensor, as ``mlx_lm.convert`` computes them."""
    return list(mx.quantize(dense, group_size=group_size, bits=bits))


def dense_experts(tensors: Stored, geometry: Geometry, layer: int, layout: Layout) -> dict[str, mx.array]:
    """Return gate, up, and down [experts, out, in] of a layer in their stored type."""
    prefix = f"{'model.language_model.' if geometry.nested else 'model.'}layers.{layer}.mlp.experts"
    if layout == "fused":
        gate_up = as_array(*tensors[f"{prefix}.gate_up_proj"])
        size = geometry.expert_size
        return {"gate": gate_up[:, :size], "up": gate_up[:, size:], "down": as_array(*tensors[f"{prefix}.down_proj"])}
    return {
        part: mx.stack([as_array(*tensors[f"{prefix}.{e}.{part}_proj.weight"]) for e in range(geometry.experts)])
        for part in ("gate", "up", "down")
    }


def published_parts(tensors: Stored, layer: int) -> list[mx.array]:
    """Return the nine stacked tensors of a quantized layer in the order of a record."""
    prefix = f"language_model.model.layers.{layer}.mlp.switch_mlp"
    return [
        as_array(*tensors[f"{prefix}.{projection}_proj.{part}"])
        for projection in ("gate", "up", "down")
        for part in ("weight", "scales", "biases")
    ]


def quantized_parts(dense: dict[str, mx.array], bits: int, group_size: int) -> list[mx.array]:
    """Quantize a dense layer; return its nine stacked tensors in the order of a record."""
    return [part for name in ("gate", "up", "down") for part in quantized(dense[name], bits, group_size)]


def layer_bytes(parts: list[mx.array]) -> bytes:
    """Return the layer file of stacked tensors: the slices of one expert after another, each record padded."""
    records = []
    for expert in range(parts[0].shape[0]):
        record = b"".join(raw(part[expert]) for part in parts)
        records.append(record + bytes(-len(record) % _ALIGNMENT))
    return b"".join(records)


def tree(folder: Path) -> dict[str, str]:
    """Return the hash of every file below ``folder`` by its relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_json(path: Path, **changes: Any) -> None:
    """Replace top-level values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_one_line(error: BaseException) -> None:
    """Assert that the message is one printable line."""
    text = str(error)
    assert text
    assert text.isprintable()
