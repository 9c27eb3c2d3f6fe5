"""Supported and unsupported models: one answer for all tasks, in one line, before anything is fetched or allocated."""

import copy
import json
import math
import tracemalloc
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack_oracle import assert_one_line

from flashmoe_mlx.checkpoint.formats import format_in_name, format_of_tensors, mlx_settings
from flashmoe_mlx.checkpoint.names import canonical_name, describe_found, is_skipped
from flashmoe_mlx.checkpoint.published import known_config, original_of, published_configs
from flashmoe_mlx.checkpoint.support import refuse_named_format, refuse_unsupported, why_not
from flashmoe_mlx.errors import CheckpointError, InputError
from flashmoe_mlx.formats.untrusted import parse_object, read_object, same_json
from flashmoe_mlx.models.qwen3_5_moe import FAMILY
from flashmoe_mlx.models.registry import parse_config

NAMES = FAMILY.tensor_names
PUBLISHED = published_configs()
FOLDER = Path(__file__).parent / "published"
CONFIGS: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
PLAIN = CONFIGS["Qwen3.5-35B-A3B"]
MLX = {"group_size": 64, "bits": 4, "mode": "affine"}
GATE = "language_model.model.layers.0.mlp.gate"


def changed(**changes: Any) -> dict[str, Any]:
    """Return the config of a published model with other values in its text part."""
    return {**PLAIN, "text_config": {**PLAIN["text_config"], **changes}}


def refusal(config: dict[str, Any]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        refuse_unsupported(config, "here")
    assert_one_line(caught.value)
    assert str(caught.value) == f"here: {why_not(config)}"
    return caught.value


# Models


@pytest.mark.parametrize("config", [*CONFIGS.values(), *PUBLISHED.values()], ids=[*CONFIGS, *PUBLISHED])
def test_published_configs_are_supported(config: dict[str, Any]) -> None:
    assert why_not(config) is None


@pytest.mark.parametrize(
    ("config", "code", "says"),
    [
        ({"model_type": "qwen3_5", "text_config": {"hidden_size": 5120}}, "dense_model", "nothing to stream"),
        ({"model_type": "llama", "hidden_size": 64}, "dense_model", "mlx-lm"),
        ({"model_type": "step3p7", "num_experts": 64}, "unsupported_model", "Step-3.7-Flash"),
        ({"model_type": "minimax_m3", "num_local_experts": 128}, "unsupported_model", "MiniMax-M3"),
        ({"model_type": "deepseek_v4", "n_routed_experts": 256}, "unsupported_model", "DeepSeek-V4"),
        ({"model_type": "new_moe", "text_config": {"num_experts": 8}}, "unsupported_model", "new_moe"),
        ({"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_next"}}, "unsupported_model", "qwen3_next"),
        ({"model_type": "a\nb", "num_experts": 8}, "unsupported_model", "a\\nb"),
        ({"model_type": ["qwen3_5_moe"], "num_experts": 8}, "unsupported_model", "Qwen3.5"),
        ({"model_type": float("nan"), "num_experts": 8}, "unsupported_model", "Qwen3.5"),
        ({}, "invalid_config", "model_type"),
        ({"model_type": None}, "invalid_config", "model_type"),
        (
            {"model_type": "x_omni", "thinker_config": {"text_config": {"num_experts": 8}}},
            "unsupported_model",
            "x_omni",
        ),
        ({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}}, "unsupported_model", "dbrx"),
        ({"model_type": "y", "llm_config": {"num_local_experts": 8}}, "unsupported_model", "'y'"),
        ({"model_type": "z", "num_experts": 0, "text_config": {"n_routed_experts": None}}, "dense_model", "'z'"),
        ({**PLAIN, "text_config": 5}, "invalid_config", "text_config"),
    ],
)
def test_other_models_are_refused_with_names_of_models(config: dict[str, Any], code: str, says: str) -> None:
    error = refusal(config)
    assert error.code == code
    assert says in str(error)
    assert not any(f"use {kind}" in str(error) for kind in FAMILY.model_types), "nobody can use a model_type"


def test_the_family_comes_before_the_format() -> None:
    """Another format of an unsupported model would not help."""
    config = {"model_type": "step3p7", "num_experts": 128, "quantization_config": {"quant_method": "fp8"}}
    assert refusal(config).code == "unsupported_model"


# Formats

NOT_READ = [
    ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}}, "e5m2"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, "weight_block_size 128"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}}, "weight_block_size"),
    ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "fbgemm"),
    ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "NVFP4"),
    ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}}, "modelopt"),
    ({"quantization_config": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}, "FP8"),
    ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, "compressed-tensors"),
    ({"compression_config": {"config_groups": {"group_0": {}}}}, "compressed-tensors"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 5, "group_size": 128}}, "GPTQ (5 bits)"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}}, "marlin"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "is_marlin_format": True}}, "marlin"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}}, "gemv"),
    ({"quantization_config": {"quant_method": "awq", "bits": 3, "version": "gemm"}}, "AWQ (3 bits)"),
    ({"quantization_config": {"quant_method": "auto-round", "bits": 4, "group_size": 128}}, "AutoRound"),
    ({"quantization_config": {"quant_method": "auto-round", "packing_format": "auto_round"}}, "AutoRound (auto_round)"),
    (
        {"quantization_config": {"quant_method": "auto-round", "packing_format": "auto_round:fp8"}},
        "AutoRound (auto_round:fp8)",
    ),
    (
        {"quantization_config": {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 7}},
        "7 bits",
    ),
    ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "hqq"}}, "HQQ"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
    ({"quantization_config": {"quant_method": "brand-new\n"}}, "brand-new"),
    ({"quantization_config": {"quant_method": 7}}, "7"),
    ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp5"}}, "mxfp5"),
    ({"quantization": {**MLX, f"{GATE}": {"group_size": 32, "bits": 8, "mode": "mxint8"}}}, "mxint8"),
    ({"quantization_config": {**MLX, f"{GATE}": {"mode": "nvfp5"}}}, "nvfp5"),
    ({"quantization": "4bit"}, "4bit"),
    ({"quantization": [4]}, "[4]"),
]


@pytest.mark.parametrize(("settings", "says"), NOT_READ)
@pytest.mark.parametrize("nested", [False, True])
def test_formats_that_cannot_be_read_are_named(settings: dict[str, Any], says: str, nested: bool) -> None:
    error = refusal(changed(**settings) if nested else {**PLAIN, **settings})
    assert error.code == "unsupported_format"
    assert says in str(error)
    assert "bf16" in str(error), "and what to use instead"


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
        {"quantization_config": {"quant_method": "GPTQ", "bits": 3, "checkpoint_format": "gptq_v2"}},
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
        {"quantization_config": {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}},
        {"quantization_config": {"bits": 4, "group_size": 128, "zero_point": True, "version": "GEMM"}},
        {},
        {"quantization": None},
        {"quantization_config": None},
        {"quantization": {}},
        {"quantization": {"group_size": 64, "bits": 4}},  # before there were modes
        {"quantization": MLX, "quantization_config": MLX},
        {"quantization_config": {**MLX, "load_in_4bit": False, "load_in_8bit": False}},
        {"quantization": {**MLX, GATE: {"bits": 8}}},
        {"quantization": {**MLX, GATE: {"group_size": 32}}},
        {"quantization": {**MLX, GATE: False}},
        {"quantization": {**MLX, GATE: True}},
        {"quantization": {**MLX, GATE: None}},
        {"quantization": {**MLX, GATE: {"bits": 8, "mode": None}}},
        {"quantization": {**MLX, "vision_tower.blocks.0.mlp": {"mode": "mxfp8"}}},  # not text
        {"quantization": MLX, "quantization_config": {"quant_method": "fp8"}},  # the format of the original
        {"quantization_config": {**MLX, "quant_method": "mlx"}},
    ],
)
def test_formats_that_can_be_read(settings: dict[str, Any]) -> None:
    assert why_not({**PLAIN, **settings}) is None


def test_settings_of_mlx_are_found_under_either_key() -> None:
    assert mlx_settings({"quantization": MLX}) == mlx_settings({"quantization_config": MLX}) == MLX
    assert mlx_settings({"text_config": {"quantization": MLX}}) == MLX
    assert mlx_settings({"quantization_config": {"quant_method": "mlx", **MLX}})["bits"] == 4
    assert mlx_settings({"quantization_config": {"quant_method": "gptq", "bits": 4}}) == {}
    assert mlx_settings({"quantization": "4bit"}) == mlx_settings({}) == {}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("unsloth/Qwen3.5-397B-A17B-GGUF", "GGUF"),
        ("Qwen/Qwen3.5-35B-A3B-FP8", None),
        ("Qwen/Qwen3-30B-A3B-GPTQ-Int4", None),
        ("x/Qwen3.5-35B-A3B-AWQ-INT8", None),
        ("Intel/Qwen3.5-35B-A3B-int4-AutoRound", None),
        ("nvidia/Qwen3.5-397B-A17B-NVFP4", "NVFP4"),
        ("x/Qwen3.5-35B-A3B-bnb-4bit", "bnb"),
        ("x/Qwen3.5-35B-A3B.w4a16", "w4a16"),
        ("x/Qwen3.5-35B-A3B-exl2", "exl2"),
        ("x/Qwen3.5-35B-A3B-INT4", "INT4"),
        ("x/Qwen3.5-35B-A3B-NVFP4A16", "NVFP4A16"),
        ("x/Qwen3.5-35B-A3B-W4A4", "W4A4"),
        ("x/Qwen3.5-35B-A3B-Q4_K_M", "Q4_K_M"),
        ("x/Qwen3.5-35B-A3B-IQ4_XS", "IQ4_XS"),
        ("mlx-community/Qwen3.5-35B-A3B-int4", None),
        ("mlx-community/Qwen3.5-35B-A3B-nvfp4", None),
        ("mlx-community/Qwen3.5-35B-A3B-mxfp4", None),
        ("mlx-community/Qwen3.5-35B-A3B-4bit", None),
        ("mlx-community/Qwen3.5-35B-A3B-FP8-4bit", None),
        ("Qwen/Qwen3.5-35B-A3B", None),
        ("x/Qwen3.5-awqward-model", None),
    ],
)
def test_formats_in_names(name: str, found: str | None) -> None:
    assert format_in_name(name) == found
    if found is not None:
        with pytest.raises(CheckpointError, match=found) as caught:
            refuse_named_format(name)
        assert caught.value.code == "unsupported_format"
        assert_one_line(caught.value)


def test_the_original_of_a_conversion_is_named() -> None:
    assert original_of("unsloth/Qwen3.6-35B-A3B-GGUF") == "Qwen/Qwen3.6-35B-A3B"
    assert original_of("bartowski/Qwen_Qwen3.5-397B-A17B-GGUF") == "Qwen/Qwen3.5-397B-A17B"
    assert original_of("x/Other-7B") is None
    assert known_config("x/Qwen3.5-35B-A3B-REAP-25B") is None, "a model with fewer experts"
    with pytest.raises(CheckpointError, match=r"Qwen/Qwen3\.8-2\.4T-A95B"):
        refuse_named_format("unsloth/Qwen3.8-2.4T-A95B-GGUF")


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([("a.weight", "F8_E4M3"), ("a.weight_scale_inv", "BF16")], "FP8"),
        ([("a.weight", "F8_E4M3"), ("a.other", "BF16")], "FP8"),
        ([("a.weight", "U8"), ("a.weight_scale", "F8_E4M3"), ("a.weight_scale_2", "F32")], "NVFP4"),
        ([("a.weight_packed", "I32"), ("a.weight_scale", "BF16")], "compressed-tensors"),
        ([("a.qweight", "I32"), ("a.qzeros", "I32"), ("a.scales", "F16")], "GPTQ"),
        ([("a.weight", "U8"), ("a.weight.absmax", "U8")], "bitsandbytes"),
        ([("a.q_proj.lora_A.weight", "BF16")], "LoRA"),
        ([("a.down_proj_blocks", "U8"), ("a.down_proj_scales", "U8")], "MXFP4"),
        ([("a.weight", "U32"), ("a.scales", "BF16"), ("a.biases", "BF16")], None),
        ([("a.weight", "BF16"), ("model.layers.0.mlp.experts.gate_up_proj", "BF16")], None),
    ],
)
def test_formats_in_tensors(tensors: list[tuple[str, str]], says: str | None) -> None:
    found = format_of_tensors(tensors)
    assert found is None if says is None else says in (found or "")


# Names


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.0.mlp.gate.weight",
        "model.language_model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.gate.weight",
        "layers.0.mlp.gate.weight",
        "language_model.layers.0.mlp.gate.weight",
        "_orig_mod.model.layers.0.mlp.gate.weight",
        "model._orig_mod.language_model.layers.0.mlp.gate.weight",
        "module.model.layers.0.mlp.gate.weight",
        "base_model.model.model.language_model.layers.0.mlp.gate.weight",
        "module._orig_mod.model.layers.0.mlp.gate.weight",
    ],
)
def test_prefixes_of_names(name: str) -> None:
    assert canonical_name(name, NAMES) == "model.layers.0.mlp.gate.weight"
    assert not is_skipped(name, NAMES)


def test_names_without_the_usual_prefixes() -> None:
    assert (
        canonical_name("language_model.lm_head.weight", NAMES)
        == canonical_name("_orig_mod.lm_head.weight", NAMES)
        == "lm_head.weight"
    )
    for name in ("norm.weight", "language_model.norm.weight"):
        assert canonical_name(name, NAMES) == "model.norm.weight"
    assert canonical_name("embed_tokens.weight", NAMES) == "model.embed_tokens.weight"
    skipped = (
        "model.visual.x",
        "_orig_mod.model.visual.x",
        "mtp.fc.weight",
        "vision_tower.x",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    )
    assert all(is_skipped(name, NAMES) for name in skipped)


def test_message_about_a_missing_tensor_names_its_neighbors() -> None:
    wanted = "model.layers.0.mlp.experts.0.gate_proj.weight"
    beside = ["model.layers.0.mlp.switch_mlp.gate_up_proj.weight", "model.norm.weight"]
    assert "switch_mlp.gate_up_proj" in describe_found(wanted, beside)
    for fused in ("experts.0.gate_up_proj.weight", "experts.gate_up_proj.weight", "experts.w13", "experts.0.w1.weight"):
        assert "not supported" in describe_found(wanted, [f"model.layers.0.mlp.{fused}"])
    others = [f"model.layers.0.mlp.experts.{i}.fc.weight" for i in range(9)]
    assert "model.layers.0.mlp.experts.0.fc.weight" in describe_found(wanted, others)
    assert "head" in describe_found("lm_head.weight", ["model.norm.weight"])
    for names in (beside, others, []):
        assert "download" not in describe_found(wanted, names)


# Fields


@pytest.mark.parametrize(
    "changes",
    [
        {"output_gate_type": "swish"},  # Qwen3.6 and Qwen3.8 say so
        {"output_gate_type": "silu"},
        {"hidden_act": "swish"},
        {"norm_topk_prob": True},
        {"decoder_sparse_step": 1},
        {"mlp_only_layers": []},
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 48},
        {"sliding_window": None},
        {"final_logit_softcapping": None},
        {"rope_scaling": None},
        {"router_aux_loss_coef": 0.01, "output_router_logits": True, "router_jitter_noise": 0.1},
        {"mtp_num_hidden_layers": 3, "mtp_loss_scaling_factor": 0.3},
        {"some_new_name": 7, "use_cache": False, "torch_dtype": "float16"},
        {"expert_bias": False, "hc_mult": 0, "index_topk": None},
    ],
)
def test_harmless_fields_are_ignored(changes: dict[str, Any]) -> None:
    assert why_not(changed(**changes)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"output_gate_type": "sigmoid"},
        {"attn_output_gate": False},
        {"hidden_act": "gelu"},
        {"norm_topk_prob": False},
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [0]},
        {"use_sliding_window": True, "sliding_window": 4096},
        {"sliding_window": 4096},
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"scoring_func": "sigmoid"},
        {"routed_scaling_factor": 2.5},
        {"n_group": 8},
        {"first_k_dense_replace": 3},
        {"num_shared_experts": 2},
        {"embedding_multiplier": 12},
        {"residual_multiplier": 0.22},
        {"swiglu_limit": 7.0},
        {"hc_mult": 4},
        {"index_topk": 2048},
        {"ngram_size": 3},
        {"attention_sinks": True},
        {"swiglu_alpha": 1.702},
        {"moe_latent_size": 3584},
        {"attn_output_gate": float("nan")},
        {"query_pre_attn_scalar": 256},
    ],
)
def test_fields_that_change_the_arithmetic_are_refused(changes: dict[str, Any]) -> None:
    error = refusal(changed(**changes))
    assert error.code == "unsupported_arithmetic"
    assert next(iter(changes)) in str(error)


# Any config

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, 2, 2**12, 2**16, 2**24, 2**31]),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.lists(st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=5), st.integers() | st.floats(), max_size=2),
)


def places(value: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for key, inner in value.items():
        yield value, key
        if isinstance(inner, dict) and len(inner) < 50:
            yield from places(inner)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), name=st.sampled_from(sorted(CONFIGS)))
def test_any_change_of_a_published_config(data: st.DataObject, name: str) -> None:
    config = copy.deepcopy(CONFIGS[name])
    for _ in range(data.draw(st.integers(1, 3))):
        holder, key = data.draw(st.sampled_from(list(places(config))))
        holder[data.draw(st.just(key) | st.text(max_size=10))] = data.draw(ODD)
    tracemalloc.start()
    try:
        refusal = why_not(config)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6, "nothing may be allocated by the numbers of a config"
    if refusal is None:
        parsed = parse_config(config)
        values = (getattr(parsed, field.name) for field in fields(parsed))
        sizes = [value for value in values if isinstance(value, (int, float))]
        assert all(math.isfinite(size) for size in sizes)
        assert all(size > 0 for size in next(parsed.resident_parameters()).shape)
    else:
        assert_one_line(Exception(refusal))
        with pytest.raises(InputError):
            refuse_unsupported(config, "here")


# JSON


@pytest.mark.parametrize("constant", ["Infinity", "-Infinity", "NaN", "1e999"])
def test_foreign_json_is_read_as_python_reads_it_and_our_own_strictly(constant: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(f'{{"model_type": "new_moe", "n_routed_experts": 8, "time_step_limit": [0.0, {constant}]}}')
    assert read_object(path)["model_type"] == "new_moe"
    assert refusal(read_object(path)).code == "unsupported_model"
    with pytest.raises(InputError) as caught:
        read_object(path, strict=True)
    assert caught.value.code == "invalid_json"
    assert_one_line(caught.value)
    with pytest.raises(ValueError, match="not valid JSON"):
        parse_object(path.read_text())


def test_equal_json() -> None:
    assert same_json({"a": float("nan"), "b": 1}, {"b": 1, "a": float("nan")})
    assert not same_json({"a": 1}, {"a": True})
    assert not same_json({"a": 1}, {"a": 1.0})


def test_an_index_may_be_large(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text('{"a": "' + "x" * 3000 + '"}')
    with pytest.raises(InputError) as caught:
        read_object(path, limit=2000)
    assert caught.value.code == "file_too_large"
    assert len(read_object(path, limit=4000)["a"]) == 3000
