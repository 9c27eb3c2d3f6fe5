"""Tiny checkpoints in block FP8, GPTQ and AWQ, written from the definitions of these formats, with the decoded weights.

Codes are random, so the decoded weights follow from the definition alone, and no quantizer is involved.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tiny_checkpoints import GEOMETRIES, OLDER_GEOMETRIES, Geometry, _from_bf16, _published_tensors, _to_bf16

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of eight neighboring ones, of each four bits of a word of AWQ."""
Stored = dict[str, tuple[str, np.ndarray]]
"""Safetensors types and values by name."""


def e4m3(code: int) -> float:
    """Return the value of an FP8 code: a sign, 4 bits of exponent with bias 7, and 3 bits of fraction."""
    sign, exponent, fraction = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if (exponent, fraction) == (15, 7):
        return float("nan")
    return sign * (2.0**-6 * fraction / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + fraction / 8))


def float8(
    random: np.random.Generator, name: str, shape: tuple[int, ...], block: tuple[int, int], scales: str
) -> tuple[Stored, np.ndarray]:
    """Return a weight [..., out, in] in FP8 with ``<name>_scale_inv`` of the type ``scales``, and its values in f32."""
    codes = random.integers(0, 127, shape).astype(np.uint8) | (random.integers(0, 2, shape) << 7).astype(np.uint8)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    factors = (random.uniform(0.5, 1.5, grid) / (150 * shape[-1] ** 0.5)).astype(np.float32)
    stored = factors
    if scales == "BF16":
        stored = _to_bf16(factors)
        factors = _from_bf16(stored)
    dense = np.array([e4m3(code) for code in range(256)], np.float32)[codes]
    for *outer, row, column in np.ndindex(*grid):
        rows, columns = slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1])
        dense[(*outer, rows, columns)] *= factors[(*outer, row, column)]
    return {name: ("F8_E4M3", codes), f"{name}_scale_inv": (scales, stored)}, dense


def integers(
    random: np.random.Generator,
    module: str,
    shape: tuple[int, int],
    method: str,
    bits: int,
    group_size: int,
    order: bool = False,
    version: int = 1,
) -> tuple[Stored, np.ndarray]:
    """Return the tensors of a weight [out, in] in GPTQ or AWQ, and its values in f32.

    Args:
        random: draws codes, zeros and scales.
        module: the beginning of the names.
        shape: the shape of the weight.
        method: "gptq" or "awq".
        bits: the width of a code.
        group_size: the inputs in a group.
        order: whether ``g_idx`` assigns inputs to groups at random.
        version: of GPTQ; version 1 stores zeros less 1.
    """
    out, inputs = shape
    count = inputs // group_size
    codes = random.integers(0, 2**bits, shape)
    zeros = random.integers(1, 2**bits, (count, out))
    scales = (random.uniform(0.5, 1.5, (count, out)) / (2**bits * inputs**0.5)).astype(np.float16)
    group = np.repeat(np.arange(count), group_size)
    if order:
        random.shuffle(group)
    dense = (codes - zeros[group].T) * scales[group].T.astype(np.float32)
    if method == "awq":
        qweight, qzeros = _awq_words(codes.T), _awq_words(zeros)
    else:
        qweight = _stream_words(codes.T, bits)
        qzeros = _stream_words((zeros - (version == 1)).T, bits).T
    stored: Stored = {
        f"{module}.qweight": ("I32", qweight),
        f"{module}.qzeros": ("I32", qzeros),
        f"{module}.scales": ("F16", scales),
    }
    if method == "gptq":
        stored[f"{module}.g_idx"] = ("I32", group.astype(np.int32))
    return stored, dense.astype(np.float32)


def _stream_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack ``codes`` [n, columns] along the first axis: one stream of n * bits bits a column, cut into words."""
    single = codes.T[..., None] >> np.arange(bits) & 1
    stream = np.packbits(single.reshape(codes.shape[1], -1).astype(np.uint8), axis=1, bitorder="little")
    return np.ascontiguousarray(stream.view(np.int32).T)


def _awq_words(codes: np.ndarray) -> np.ndarray:
    """Pack ``codes`` [rows, columns] along the second axis in AWQ's order."""
    words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for place, column in enumerate(AWQ_ORDER):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def write_tensors(path: Path, stored: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """Write a safetensors file."""
    header, end = {}, 0
    for name, (dtype, values) in stored.items():
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    text = json.dumps(header).encode()
    data = [len(text).to_bytes(8, "little"), text, *(np.ascontiguousarray(v).tobytes() for _, v in stored.values())]
    path.write_bytes(b"".join(data))


def settings_of(form: str) -> dict[str, Any]:
    """Return ``quantization_config`` of a form: "fp8", "gptq", "gptq-order", "gptq-v2", "gptq-round" or "awq"."""
    if form == "fp8":
        return {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    if form == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    if form == "gptq-round":
        layout = {"packing_format": "auto_round:auto_gptq", "autoround_version": "0.5.1"}
        return {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, **layout}
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": form == "gptq-order", "sym": False}
    return settings | ({"checkpoint_format": "gptq_v2"} if form == "gptq-v2" else {})


def write_coded(folder: Path, form: str, geometry: Geometry, plain: Path | None = None, parted: bool = False) -> None:
    """Write a checkpoint whose matrices are in codes, except for routers and embeddings, as they are published.

    Args:
        folder: the folder of the checkpoint.
        form: see ``settings_of``.
        geometry: the sizes of the model.
        plain: a folder for the same model with the decoded weights, in bf16, or in f16 for GPTQ and AWQ.
        parted: whether codes and their scales lie in different files.
    """
    random = np.random.default_rng(0)
    coded: Stored = {}
    dense: Stored = {}
    for name, values in _published_tensors(geometry, 0, "per_expert", "BF16").items():
        matrix = values.ndim == 2 and not any(
            part in name for part in ("embed", "lm_head", "mlp.gate.", "_gate.", "_ba.")
        )
        if not matrix or values.shape[1] % 32 or values.shape[0] % 32:
            dtype = "F32" if values.dtype == np.float32 else "BF16"
            coded[name] = dense[name] = (dtype, values)
        elif form == "fp8":
            stored, weights = float8(random, name, values.shape, (128, 128), "BF16")
            coded |= stored
            dense[name] = ("BF16", _to_bf16(weights))
        else:
            method, order, version = form[:4].rstrip("-"), form == "gptq-order", 2 if form == "gptq-v2" else 1
            module = name.removesuffix(".weight")
            stored, weights = integers(random, module, values.shape, method, 4, 32, order, version)
            coded |= stored
            dense[name] = ("F16", weights.astype(np.float16))
    folder.mkdir(parents=True)
    config = geometry.config("per_expert", "BF16")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings_of(form)}))
    if parted:
        first = {name: entry for name, entry in coded.items() if not name.endswith(("_scale_inv", ".scales"))}
        write_tensors(folder / "model-00001-of-00002.safetensors", first)
        rest = {name: entry for name, entry in coded.items() if name not in first}
        write_tensors(folder / "model-00002-of-00002.safetensors", rest)
    else:
        write_tensors(folder / "model.safetensors", coded)
    if plain is not None:
        plain.mkdir(parents=True)
        (plain / "config.json").write_text(json.dumps(config))
        write_tensors(plain / "model.safetensors", dense)


FORMS = ("fp8", "gptq", "gptq-order", "gptq-v2", "gptq-round", "awq")
CODED_GEOMETRIES: Mapping[str, Geometry] = {
    "qwen3_5_moe": replace(GEOMETRIES["text"], layer_types="LF", experts=6),
    "qwen3_moe": replace(OLDER_GEOMETRIES["moe"], layer_types="FF", experts=6),
    "qwen3_next": replace(OLDER_GEOMETRIES["next"], layer_types="LF", experts=6),
}
