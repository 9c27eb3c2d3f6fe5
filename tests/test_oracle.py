"""Live comparison with transformers and mlx-lm: ``pytest -m oracle``, with the ``oracle`` extra installed."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.recorded import (
    CASES,
    DENSE_CASES,
    LONG_CASES,
    LONG_PROMPT_LENGTH,
    LONG_ROWS,
    PROMPT_LENGTH,
    TOLERANCE,
    Case,
    Encoding,
    LongCase,
)
from tiny_checkpoints import GEOMETRIES, OLDER_GEOMETRIES, Dtype, Geometry, dense_weights, write_checkpoint

import flashmoe_mlx
from flashmoe_mlx.layers.rope import read_rope
from flashmoe_mlx.pack.writer import pack_checkpoint

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch", reason="needs the oracle extra", exc_type=ImportError)
transformers = pytest.importorskip("transformers", reason="needs the oracle extra", exc_type=ImportError)
mlx_lm = pytest.importorskip("mlx_lm.utils", reason="needs the oracle extra", exc_type=ImportError)

from oracle.reference import Reference  # noqa: E402  (it imports torch)

DRIFT = TOLERANCE / 10
"""Tolerance between a recording and the same code on a different machine."""


def assert_agree(logits: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


def our_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Return our logits: one forward pass for the prompt, one for each further token."""
    with flashmoe_mlx.load(folder) as engine:
        cache = engine.new_cache()
        rows = [engine.forward(tokens[:PROMPT_LENGTH], cache)]
        rows += [engine.forward(tokens[i : i + 1], cache) for i in range(PROMPT_LENGTH, len(tokens))]
    return np.concatenate(rows)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recordings_equal_transformers(case: Case) -> None:
    recording = case.load()
    reference = Reference(case.geometry, case.weights(), case.experts_k)
    assert_agree(reference.prefill_then_decode(recording.tokens, PROMPT_LENGTH), recording.logits, DRIFT)


@given(
    head_dim=st.sampled_from([32, 64, 128, 256]),
    share=st.sampled_from([0.25, 0.5, 1.0]),
    theta=st.floats(10.0, 1e8),
    context=st.integers(16, 2**20),
    more=st.fixed_dictionaries(
        {"factor": st.floats(1.0, 64.0)},
        optional={
            "original_max_position_embeddings": st.integers(16, 2**20),
            "beta_fast": st.floats(8.0, 64.0),
            "beta_slow": st.floats(0.1, 8.0),
            "attention_factor": st.floats(0.1, 2.0),
            "mscale": st.floats(0.0, 2.0),
            "mscale_all_dim": st.floats(0.0, 2.0),
            "truncate": st.booleans(),
        },
    ),
)
@settings(max_examples=300, deadline=None)
def test_yarn_equals_transformers(
    head_dim: int, share: float, theta: float, context: int, more: dict[str, Any]
) -> None:
    values = {"rope_type": "yarn", "rope_theta": theta, "partial_rotary_factor": share, **more}
    config = transformers.Qwen3_5MoeTextConfig(
        head_dim=head_dim, max_position_embeddings=context, rope_parameters=dict(values)
    )
    frequencies, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config)
    rope = read_rope({"rope_parameters": values}, head_dim, context, 0.25)
    assert rope.yarn is not None
    assert rope.yarn.attention_factor == pytest.approx(factor, rel=1e-6)
    # transformers computes in f32, including the ramp between the bounds.
    np.testing.assert_allclose(rope.frequencies(), frequencies.numpy(), rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_long_recordings_equal_transformers(case: LongCase) -> None:
    recording = case.load()
    reference = Reference(case.geometry, case.weights(), case.experts_k)
    logits = reference.prefill_then_decode(recording.tokens, LONG_PROMPT_LENGTH)
    assert_agree(logits[LONG_ROWS], recording.logits, DRIFT)


@pytest.mark.parametrize("case", DENSE_CASES, ids=lambda case: case.name)
def test_small_chunks_over_whole_recordings(case: Case, tmp_path: Path) -> None:
    """The everyday tests use small chunks only for a few tokens, because small chunks take long."""
    recording = case.load()
    with flashmoe_mlx.load(case.write_checkpoint(tmp_path)) as engine:
        for chunk in (1, 7):
            assert_agree(engine.logits(recording.tokens, prefill_chunk=chunk), recording.logits)


@pytest.mark.parametrize("original_format", [False, True], ids=["fused", "original"])
@pytest.mark.parametrize("name", ["plain", "tied", "text", "moe-mlp", "moe-yarn", "next", "next-mlp", "hyper-dense"])
def test_checkpoints_saved_by_transformers(name: str, original_format: bool, tmp_path: Path) -> None:
    case = Case(name, 0, "dense", "F32")
    recording = case.load()
    model = published_model(case.geometry, case.weights())
    model.save_pretrained(tmp_path, save_original_format=original_format)
    assert_agree(our_logits(tmp_path, recording.tokens), recording.logits)


def published_model(geometry: Geometry, weights: Mapping[str, np.ndarray]) -> Any:
    """Return the model as it is published, with an untrained vision tower if the config is nested."""
    if not geometry.nested:
        return Reference(geometry, weights).model
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5MoeConfig(**geometry.config() | {"vision_config": vision})
    model = transformers.Qwen3_5MoeForConditionalGeneration(config).eval()
    state = {name: torch.from_numpy(values) for name, values in weights.items()}
    head = state.pop("lm_head.weight", state["embed_tokens.weight"])
    model.model.language_model.load_state_dict(state, strict=True)
    model.lm_head.load_state_dict({"weight": head}, strict=True)
    return model


@pytest.mark.parametrize(
    ("name", "dtype", "bits", "group_size"),
    [("plain", "BF16", 4, 64), ("plain", "BF16", 2, 64), ("tied", "F32", 4, 32), ("wide", "F32", 2, 32)],
)
def test_logits_of_packs_equal_transformers(
    name: str, dtype: Dtype, bits: int, group_size: int, tmp_path: Path
) -> None:
    geometry = GEOMETRIES[name]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", geometry, seed=1, dtype=dtype)
    pack_checkpoint(checkpoint, tmp_path / "pack", bits=(bits,), group_size=group_size)
    reference = Reference(geometry, weights_in_pack(tmp_path / "pack", geometry))
    tokens, expected = reference.unambiguous_run(f"packed {name} {dtype} {bits}")
    assert_agree(our_logits(tmp_path / "pack", tokens), expected)


def weights_in_pack(pack: Path, geometry: Geometry) -> dict[str, np.ndarray]:
    """Return all weights of a pack by canonical name, read by its manifest alone and dequantized by MLX."""
    stored = mx.load(str(pack / "resident.safetensors"))
    weights = {}
    for name, dense in dense_weights(geometry, seed=0).items():
        if ".experts." in name:
            continue
        pack_name = name if name.startswith("lm_head") else f"model.{name}"
        values = stored[pack_name]
        if values.dtype == mx.uint32:
            values = dequantize(stored, pack_name.removesuffix(".weight"), dense.shape[-1])
        values = values.astype(mx.float32)
        if name.endswith("conv1d.weight"):
            values = values.swapaxes(1, 2)
        elif name.endswith(("layernorm.weight", "q_norm.weight", "k_norm.weight")) or name == "norm.weight":
            values = values - 1.0
        weights[name] = np.array(values).reshape(dense.shape)
    ((variant_name, variant),) = json.loads((pack / "pack.json").read_text())["variants"].items()
    for layer in range(geometry.num_layers):
        data = np.fromfile(pack / f"experts-{variant_name}" / f"layer_{layer:02d}.bin", np.uint8)
        records = mx.array(data.reshape(geometry.experts, variant["record_bytes"]))
        projections = {name: dense_projection(records, variant, name) for name in ("gate", "up", "down")}
        prefix = f"layers.{layer}.mlp.experts"
        weights[f"{prefix}.gate_up_proj"] = np.concatenate([projections["gate"], projections["up"]], axis=1)
        weights[f"{prefix}.down_proj"] = projections["down"]
    return weights


def dense_projection(records: mx.array, variant: Mapping[str, Any], name: str) -> np.ndarray:
    dtypes = {"U32": mx.uint32, "BF16": mx.bfloat16, "F32": mx.float32}
    parts = {}
    for component in variant["components"]:
        begin, end = component["offset"], component["offset"] + component["bytes"]
        values = mx.contiguous(records[:, begin:end]).view(dtypes[component["dtype"]])
        parts[component["name"]] = values.reshape(-1, *component["shape"])
    columns = parts[f"{name}.scales"].shape[-1] * variant["group_size"]
    return np.array(dequantize(parts, name, columns))


def dequantize(stored: Mapping[str, mx.array], name: str, columns: int) -> mx.array:
    """Dequantize in float32, since MLX rounds the products to the type of the scales."""
    codes, scales, biases = (stored[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
    bits, group_size = codes.shape[-1] * 32 // columns, columns // scales.shape[-1]
    return mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), group_size, bits)


@pytest.mark.parametrize("encoding", ["dense", "mlx4"])
def test_recordings_equal_mlx_lm(encoding: Encoding, tmp_path: Path) -> None:
    case = Case("plain", 1, encoding, "F32")
    recording = case.load()
    theirs = mlx_lm_logits(case.write_checkpoint(tmp_path), recording.tokens)
    assert_agree(theirs, recording.logits)
    assert_agree(our_logits(tmp_path, recording.tokens), theirs)


@pytest.mark.parametrize("name", ["plain", "tied", "wide"])
def test_tiny_checkpoints_equal_conversions_of_mlx_lm(name: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    ours = write_checkpoint(tmp_path / "ours", geometry, seed=1, layout="mlx4", dtype="F32")
    theirs = quantize_with_mlx_lm(tmp_path, geometry)
    assert json.loads((theirs / "config.json").read_text())["quantization"] == geometry.config("mlx4")["quantization"]
    expected = mx.load(str(theirs / "model.safetensors"))
    written = mx.load(str(ours / "model.safetensors"))
    assert written.keys() == expected.keys()
    for tensor, values in expected.items():
        assert (written[tensor].dtype, written[tensor].shape) == (values.dtype, values.shape), tensor
        assert mx.array_equal(written[tensor], values), tensor


def test_checkpoints_quantized_by_mlx_lm(tmp_path: Path) -> None:
    # The case with the same weights has tokens without close choices.
    tokens = Case("plain", 1, "mlx4", "F32").load().tokens
    checkpoint = quantize_with_mlx_lm(tmp_path, GEOMETRIES["plain"])
    pack_checkpoint(checkpoint, tmp_path / "pack", bits=(4,))
    theirs = mlx_lm_logits(checkpoint, tokens)
    assert_agree(our_logits(checkpoint, tokens), theirs)
    assert_agree(our_logits(tmp_path / "pack", tokens), theirs)


def quantize_with_mlx_lm(folder: Path, geometry: Geometry) -> Path:
    """Quantize a checkpoint like ``mlx_lm.convert -q``, without the tokenizer."""
    dense = write_checkpoint(folder / "dense", geometry, seed=1)
    model, config = mlx_lm.load_model(dense)
    model, config = mlx_lm.quantize_model(model, config, geometry.group_size, 4)
    mlx_lm.save_model(folder / "quantised", model)
    mlx_lm.save_config(config, folder / "quantised" / "config.json")
    return folder / "quantised"


def mlx_lm_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    model, _ = mlx_lm.load_model(folder)
    cache = model.make_cache()
    parts = np.split(tokens, range(PROMPT_LENGTH, len(tokens)))
    return np.concatenate([np.array(model(mx.array(part)[None], cache=cache)[0]) for part in parts])


@pytest.mark.parametrize("name", ["text", "moe"])
def test_yarn_beyond_the_original_context(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New tokens at position 300,000, with the published factor of 4 over 262,144.

    Both implementations process the same prompt, then get the same random keys and values for the tokens between. The
    angles of transformers are f32, which is wrong by up to 0.03 rad there, so f64 replaces it, as in this engine.
    """
    scaling = (("rope_type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 2**18))
    geometry = replace({**GEOMETRIES, **OLDER_GEOMETRIES}[name], context=2**20, rope_theta=1e7, scaling=scaling)
    length, prompt, new = 300_000, 16, 4
    tokens = np.random.default_rng(0).integers(0, geometry.vocab_size, prompt + new)
    reference = Reference(geometry, dense_weights(geometry, 0, "F32"))
    rotary = reference.model.model.rotary_emb

    with flashmoe_mlx.load(write_checkpoint(tmp_path / "yarn", geometry, 0)) as engine:
        frequencies = np.array(engine.model.config.rope.frequencies())
        np.testing.assert_allclose(frequencies, rotary.inv_freq.numpy(), rtol=2e-7)

        def exact(_: Any, position_ids: Any) -> tuple[Any, ...]:
            positions = position_ids.numpy().reshape(-1, position_ids.shape[-1])[0].astype(np.float64)
            angles = np.tile(positions[:, None] * frequencies, 2)[None]
            parts = (np.cos(angles), np.sin(angles))
            return tuple(torch.from_numpy((part * rotary.attention_scaling).astype(np.float32)) for part in parts)

        monkeypatch.setattr(rotary, "forward", exact)
        theirs, cache = reference.new_cache(), engine.new_cache()
        reference.forward(tokens[:prompt], theirs)
        engine.forward(tokens[:prompt], cache)
        for index, layer in enumerate(theirs.layers):
            if getattr(layer, "keys", None) is not None:
                shape = (*layer.keys.shape[:2], length - prompt, layer.keys.shape[3])
                between = [mx.random.normal(shape, key=mx.random.key(2 * index + part)) for part in (0, 1)]
                keys, values = (torch.from_numpy(np.array(array)) for array in between)
                layer.keys, layer.values = torch.cat([layer.keys, keys], 2), torch.cat([layer.values, values], 2)
                own: Any = cache.layers[index]
                own.assemble([own.part(0, prompt), type(own).of_arrays(between, length - prompt)])
        cache.length = length
        for token in tokens[prompt:]:
            assert_agree(engine.forward([token], cache), reference.forward(np.array([token]), theirs))
