"""Geometries and layouts of published models, as sparse files of true sizes.

Geometries: the configs of Qwen3.5-397B-A17B, 122B-A10B, 35B-A3B and Qwen3.6-35B-A3B, and the model card of
Qwen3.8-2.4T-A95B. Names and shapes are copied by hand from published files, and not taken from the code under test.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.published import published_configs
from flashmoe_mlx.checkpoint.tensors import classify_tensors
from flashmoe_mlx.formats.record import MatrixFormat
from flashmoe_mlx.models.registry import parse_config
from flashmoe_mlx.pack.resident import ResidentPlan
from flashmoe_mlx.research.estimate.sizes import expert_weights

Shapes = dict[str, tuple[str, tuple[int, ...]]]
PUBLISHED = published_configs()
BYTES = {"BF16": 2, "F32": 4, "U32": 4}


def text_config(
    hidden: int, layers: int, heads: int, value_heads: int, experts: int, top_k: int, size: int, kv_heads: int = 2
) -> dict[str, Any]:
    return {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": 248320,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "hidden_act": "silu",
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "full_attention_interval": 4,
        "attn_output_gate": True,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": size,
        "shared_expert_intermediate_size": size,
        "mtp_num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
    }


CONFIGS = {
    "397B": text_config(4096, 60, 32, 64, 512, 10, 1024),
    "122B": text_config(3072, 48, 32, 64, 256, 8, 1024),
    "35B": text_config(2048, 40, 16, 32, 256, 8, 512),
    # With the fields that transformers 5 adds when it saves a config; "swish" is another name of silu.
    "3.6-35B": text_config(2048, 40, 16, 32, 256, 8, 512)
    | {"output_gate_type": "swish", "mamba_ssm_dtype": "float32", "bos_token_id": None, "output_router_logits": False},
    "3.8-2.4T": text_config(8192, 92, 64, 128, 512, 10, 2048, kv_heads=4) | {"output_gate_type": "swish"},
}
RECORDS = {
    "397B": 7_077_888,
    "122B": 5_308_416,
    "35B": 1_769_472,
    "3.6-35B": 1_769_472,
    "3.8-2.4T": 28_311_552,
}
NAMES = {
    "397B": "Qwen3.5-397B-A17B",
    "122B": "Qwen3.5-122B-A10B",
    "35B": "Qwen3.5-35B-A3B",
    "3.6-35B": "Qwen3.6-35B-A3B",
    "3.8-2.4T": "Qwen3.8-2.4T-A95B",
}


def resident_matrices(text: dict[str, Any]) -> dict[str, tuple[int, int]]:
    hidden, size, vocabulary = text["hidden_size"], text["shared_expert_intermediate_size"], text["vocab_size"]
    query, key = text["num_attention_heads"] * 256, text["num_key_value_heads"] * 256
    values = text["linear_num_value_heads"] * 128
    shapes = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    for layer in range(text["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        if layer % 4 == 3:
            shapes |= {
                prefix + "self_attn.q_proj": (2 * query, hidden),
                prefix + "self_attn.k_proj": (key, hidden),
                prefix + "self_attn.v_proj": (key, hidden),
                prefix + "self_attn.o_proj": (hidden, query),
            }
        else:
            shapes |= {
                prefix + "linear_attn.in_proj_qkv": (2 * 16 * 128 + values, hidden),
                prefix + "linear_attn.in_proj_z": (values, hidden),
                prefix + "linear_attn.in_proj_b": (text["linear_num_value_heads"], hidden),
                prefix + "linear_attn.in_proj_a": (text["linear_num_value_heads"], hidden),
                prefix + "linear_attn.out_proj": (hidden, values),
            }
        shapes |= {
            prefix + "mlp.gate": (text["num_experts"], hidden),
            prefix + "mlp.shared_expert.gate_proj": (size, hidden),
            prefix + "mlp.shared_expert.up_proj": (size, hidden),
            prefix + "mlp.shared_expert.down_proj": (hidden, size),
            prefix + "mlp.shared_expert_gate": (1, hidden),
        }
    return shapes


def resident_vectors(text: dict[str, Any], conv: tuple[int, int]) -> Shapes:
    hidden, heads = text["hidden_size"], text["linear_num_value_heads"]
    shapes: Shapes = {"model.norm.weight": ("BF16", (hidden,))}
    for layer in range(text["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = ("BF16", (hidden,))
        shapes[prefix + "post_attention_layernorm.weight"] = ("BF16", (hidden,))
        if layer % 4 == 3:
            shapes[prefix + "self_attn.q_norm.weight"] = ("BF16", (256,))
            shapes[prefix + "self_attn.k_norm.weight"] = ("BF16", (256,))
        else:
            shapes[prefix + "linear_attn.conv1d.weight"] = ("BF16", (2 * 16 * 128 + heads * 128, *conv))
            shapes[prefix + "linear_attn.A_log"] = ("F32", (heads,))
            shapes[prefix + "linear_attn.dt_bias"] = ("BF16", (heads,))
            shapes[prefix + "linear_attn.norm.weight"] = ("BF16", (128,))
    return shapes


def quantized(name: str, shape: tuple[int, ...], bits: int) -> Shapes:
    *rows, columns = shape
    return {
        f"{name}.weight": ("U32", (*rows, columns * bits // 32)),
        f"{name}.scales": ("BF16", (*rows, columns // 64)),
        f"{name}.biases": ("BF16", (*rows, columns // 64)),
    }


def mlx_community(text: dict[str, Any], gate_bits: int) -> Shapes:
    experts, hidden, size = text["num_experts"], text["hidden_size"], text["moe_intermediate_size"]
    shapes = resident_vectors(text, (4, 1))
    for name, shape in resident_matrices(text).items():
        gate = name.endswith((".mlp.gate", ".mlp.shared_expert_gate"))
        shapes |= quantized(name, shape, gate_bits if gate else 4)
    for layer in range(text["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.switch_mlp."
        shapes |= quantized(prefix + "gate_proj", (experts, size, hidden), 4)
        shapes |= quantized(prefix + "up_proj", (experts, size, hidden), 4)
        shapes |= quantized(prefix + "down_proj", (experts, hidden, size), 4)
    return {f"language_model.{name}": shape for name, shape in shapes.items()}


def hugging_face(text: dict[str, Any]) -> Shapes:
    experts, hidden, size = text["num_experts"], text["hidden_size"], text["moe_intermediate_size"]
    shapes = resident_vectors(text, (1, 4))
    shapes |= {f"{name}.weight": ("BF16", shape) for name, shape in resident_matrices(text).items()}
    for layer in range(text["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        shapes[prefix + "gate_up_proj"] = ("BF16", (experts, 2 * size, hidden))
        shapes[prefix + "down_proj"] = ("BF16", (experts, hidden, size))
    shapes = {name.replace("model.", "model.language_model.", 1): shape for name, shape in shapes.items()}
    shapes["model.visual.patch_embed.proj.weight"] = ("BF16", (1152, 3, 2, 16, 16))
    shapes["mtp.layers.0.mlp.experts.gate_up_proj"] = ("BF16", (experts, 2 * size, hidden))
    return shapes


def write_sparse(folder: Path, text: dict[str, Any], shapes: Shapes, *, nested: bool = True, **more: Any) -> Checkpoint:
    """Write a checkpoint of true sizes that takes no space: only headers are written."""
    outer = {"model_type": "qwen3_5_moe", "text_config": text, "tie_word_embeddings": False}
    published = {**(outer if nested else text), **more}
    (folder / "config.json").write_text(json.dumps(published))
    names = sorted(shapes)
    shards = [names[start : start + 100] for start in range(0, len(names), 100)]
    weight_map = {}
    for index, members in enumerate(shards, 1):
        header, end = {}, 0
        for name in members:
            dtype, shape = shapes[name]
            size = BYTES[dtype] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        data = json.dumps(header).encode()
        shard = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        with (folder / shard).open("wb") as file:
            file.write(len(data).to_bytes(8, "little") + data)
            file.truncate(8 + len(data) + end)
        weight_map |= dict.fromkeys(members, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("nested", [True, False])
def test_published_configs_are_read(name: str, nested: bool) -> None:
    text = CONFIGS[name]
    config = parse_config({"model_type": "qwen3_5_moe", "text_config": text} if nested else text)
    assert (config.num_layers, config.num_experts, config.experts_per_token) == (
        text["num_hidden_layers"],
        text["num_experts"],
        text["num_experts_per_tok"],
    )
    assert sum(config.full_attention) * 4 == config.num_layers
    assert [layer for layer, full in enumerate(config.full_attention) if full][:2] == [3, 7]
    assert (config.rope.dim, config.rope.theta, config.max_context) == (64, 1e7, 262144)


@pytest.mark.parametrize("name", CONFIGS)
def test_geometries_that_are_known_without_a_network(name: str) -> None:
    known, config = (parse_config(published) for published in (PUBLISHED[NAMES[name]], CONFIGS[name]))
    assert known == config


def test_the_weights_of_the_largest_model_match_its_name() -> None:
    """Qwen/Qwen3.8-2.4T-A95B: 4.89 TB in bf16."""
    config = parse_config(PUBLISHED["Qwen3.8-2.4T-A95B"])
    resident = sum(math.prod(parameter.shape) for parameter in config.resident_parameters())
    routed = config.num_layers * config.num_experts * expert_weights(config)
    used = resident - config.vocab_size * config.hidden_size
    assert (resident + routed) * 2 == pytest.approx(4.89e12, rel=0.02)
    assert used + routed // 512 * 10 == pytest.approx(95e9, rel=0.05)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("gate_bits", [4, 8])
def test_mlx_community_conversions(name: str, gate_bits: int, tmp_path: Path) -> None:
    text = CONFIGS[name]
    gates = {
        f"language_model.model.layers.{layer}.mlp.{gate}": {"group_size": 64, "bits": 8}
        for layer in range(text["num_hidden_layers"])
        for gate in ("gate", "shared_expert_gate")
    }
    quantization = {"group_size": 64, "bits": 4, "mode": "affine", **(gates if gate_bits == 8 else {})}
    checkpoint = write_sparse(tmp_path, text, mlx_community(text, gate_bits), quantization=quantization)
    tensors = classify_tensors(checkpoint)
    layout = tensors.experts.layout[-1]
    assert layout.single_format == MatrixFormat(4, 64, "BF16")
    assert tensors.experts.layout.record_bytes == layout.record_bytes == RECORDS[name]
    pieces = tensors.experts.extents(text["num_hidden_layers"] - 1, text["num_experts"] - 1)
    assert len(pieces) == 9
    assert sum(piece.nbytes for piece in pieces) == layout.payload_bytes
    plan = ResidentPlan(tensors, bits=4, group_size=64)
    if name == "397B":
        # flash-moe extracts 2,092 tensors of 5.52 GB from the conversion with 4-bit gates.
        count = sum(len(matrix.parts) for matrix in tensors.matrices) + len(tensors.vectors)
        assert count == 2092
        assert plan.nbytes / 1e9 == pytest.approx({4: 5.516, 8: 5.579}[gate_bits], abs=0.002)


@pytest.mark.parametrize("name", CONFIGS)
def test_original_checkpoints(name: str, tmp_path: Path) -> None:
    text = CONFIGS[name]
    tensors = classify_tensors(write_sparse(tmp_path, text, hugging_face(text)))
    layout = tensors.experts.layout[0]
    assert layout.single_format == MatrixFormat(None, None, "BF16")
    assert layout.payload_bytes == 3 * 2 * text["hidden_size"] * text["moe_intermediate_size"]
    assert len(tensors.skipped) == 2


def test_a_text_only_checkpoint(tmp_path: Path) -> None:
    """Qwen/Qwen3.8-2.4T-A95B has a flat config, and names without ``language_model``."""
    text = CONFIGS["3.8-2.4T"] | {"architectures": ["Qwen3_5MoeForCausalLM"]}
    shapes = {
        name.replace("model.language_model.", "model."): shape
        for name, shape in hugging_face(text).items()
        if ".visual." not in name
    }
    tensors = classify_tensors(write_sparse(tmp_path, text, shapes, nested=False))
    assert tensors.experts.num_layers == 92
    assert {vector.add_one for vector in tensors.vectors if vector.name.endswith("layernorm.weight")} == {True}
    assert tensors.experts.layout[0].payload_bytes == 3 * 2 * 8192 * 2048
