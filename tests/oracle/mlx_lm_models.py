"""Small random checkpoints of every model of MLX-LM with routed experts."""

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from flashmoe_mlx.adapters.library import model_classes

SIZES: Mapping[str, Any] = {
    "vocab_size": 300, "num_vocab": 300, "vocab_size_per_layer_input": 300, "hidden_size": 64, "model_dim": 64,
    "intermediate_size": 128, "ffn_hidden_size": 64, "moe_intermediate_size": 64, "expert_ffn_hidden_size": 64,
    "shared_expert_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64, "shared_intermediate_size": 64,
    "share_expert_dim": 64, "num_hidden_layers": 4, "num_layers": 4, "num_attention_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "num_attention_groups": 2, "head_dim": 32, "max_position_embeddings": 512,
    "model_max_length": 512, "rms_norm_eps": 1e-5, "norm_eps": 1e-5, "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5, "rope_theta": 10000.0, "attention_bias": False, "use_bias": False,
    "tie_word_embeddings": False, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
    "moe_num_experts": 8, "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2,
    "moe_top_k": 2, "top_k_experts": 2, "n_shared_experts": 1, "num_shared_experts": 1, "num_shared_expert": 1,
    "moe_num_shared_experts": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "routed_scaling_factor": 1.5, "kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "moe_layer_freq": 1, "sliding_window": 16, "sliding_window_size": 16,
    "layer_group_size": 2, "group_norm_size": 1, "use_qk_norm": True, "rope_scaling": None, "rotary_dim": 16,
    "partial_rotary_factor": 0.5, "index_head_dim": 32, "index_n_heads": 2, "index_topk": 24, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "attention_multiplier": 0.2, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
    "logits_scaling": 2.0, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "full_attention_interval": 2, "mamba_n_heads": 4,
    "mamba_d_head": 32, "mamba_proj_bias": False, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_n_groups": 1,
    "mamba_conv_bias": True, "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "conv_kernel": 4,
    "n_groups": 1, "mlp_bias": False, "use_conv_bias": True, "mamba_expand": 2,
}  # fmt: skip
"""Sizes of a small model by the names of fields, for every model that has such a field."""

_SLIDING = ["sliding_attention", "full_attention"] * 2
_LINEAR = {
    "num_heads": 2, "head_dim": 32, "short_conv_kernel_size": 4, "kda_layers": [1, 3], "full_attn_layers": [2, 4],
}  # fmt: skip
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {"layer_types": _SLIDING},
    "exaone_moe": {"layer_types": _SLIDING, "is_moe_layer": [False, True, True, True]},
    "gemma4_text": {
        "enable_moe_block": True, "layer_types": _SLIDING, "num_kv_shared_layers": 0, "global_head_dim": 32,
        "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False, "num_global_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {"layer_types": _SLIDING, "intermediate_size": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {
        "use_mixed_mlp_moe": True, "use_cla": False, "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": {"linear_attn_config": _LINEAR},
    "laguna": {"layer_types": _SLIDING, "num_attention_heads_per_layer": [4] * 4},
    "lfm2_moe": {
        "use_expert_bias": True, "conv_bias": False, "conv_L_cache": 3, "tie_word_embeddings": True,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "longcat_flash": {
        "attention_method": "MLA", "zero_expert_type": "identity", "zero_expert_num": 2, "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {
        "zero_expert_type": "identity", "zero_expert_num": 2, "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 2,
    },
    "mellum": {
        "layer_types": _SLIDING,
        "rope_parameters": {name: {"rope_type": "default", "rope_theta": 10000.0} for name in _SLIDING},
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1], "moe_layer_freq": [0, 1, 1, 1], "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False, "swa_rope_theta": 10000.0, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2, "swa_head_dim": 32, "swa_v_head_dim": 32,
    },
    "minimax": {"shared_intermediate_size": 0},
    "mixtral": {"intermediate_size": 64},
    "nemotron_h": {"hybrid_override_pattern": "ME*E"},
    "phimoe": {
        "intermediate_size": 64,
        "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "type": "longrope",
                         "long_mscale": 1.2, "short_mscale": 1.1},
    },
    "step3p5": {"moe_layers_enum": "1,2,3", "layer_types": _SLIDING},
    "qwen3_5": {},
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "deepseek_v41": {
        "o_groups": 2, "o_lora_rank": 32, "head_dim": 64, "compress_ratios": [], "index_head_dim": 32,
    },
    "ernie4_5_moe": {"moe_layer_start_index": 1},
    "deepseek_v2": {
        "rope_scaling": {
            "type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
            "original_max_position_embeddings": 128,
        },
    },
    "kimi_k3": {"linear_attn_config": _LINEAR},
    "llama4": {
        "attention_chunk_size": 16, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 128,
        "num_experts_per_tok": 1,
    },
    "mistral4": {"rope_parameters": {
        "rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 128, "llama_4_scaling_beta": 0.1,
    }},
}  # fmt: skip
"""Further fields of some models."""
NOT_TRIED: Mapping[str, str] = {
    "minimax_m3_vl": "no small config was found that its class accepts",
    "muse_spark": "no small config was found that its class accepts",
    "prism_hadamard_qwen35": "its class reads only packs in another format",
}
"""Files without a small checkpoint here, with the reasons."""
TEXT: Mapping[str, tuple[str, str]] = {
    "gemma4": ("gemma4_text", "ModelArgs"),
    "kimi_k25": ("deepseek_v3", "ModelArgs"),
    "kimi_k3": ("kimi_k3", "TextArgs"),
    "kimi_vl": ("deepseek_v3", "ModelArgs"),
    "llama4": ("llama4", "TextArgs"),
    "minimax_m3_vl": ("minimax_m3_vl", "TextArgs"),
    "mistral3": ("mistral4", "ModelArgs"),
    "muse_spark": ("muse_spark", "TextArgs"),
    "prism_hadamard_qwen35": ("qwen3_5", "TextModelArgs"),
    "qwen3_5": ("qwen3_5", "TextModelArgs"),
    "qwen3_5_moe": ("qwen3_5", "TextModelArgs"),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs"),
}
"""For models with a text part, its module and the class of its arguments."""


def small_config(module: str) -> dict[str, Any]:
    """Return the ``config.json`` of a small model of the file ``module`` of MLX-LM."""
    if module == "bailing_moe_v3":
        own = {"model_type": "bailing_hybrid", "layer_group_size": 2, "short_conv_kernel_size": 4}
        return {**_fields(module, "ModelArgs"), **own, "architectures": ["BailingMoeV3ForCausalLM"]}
    if module in TEXT:
        return {"model_type": module, "text_config": _fields(*TEXT[module]), **SPECIAL.get(module, {})}
    return {**_fields(module, "ModelArgs"), "model_type": module}


def _fields(module: str, name: str) -> dict[str, Any]:
    args = getattr(importlib.import_module(f"mlx_lm.models.{module}"), name)
    names = [field.name for field in dataclasses.fields(args)]
    config = {name: SIZES[name] for name in names if name in SIZES} | dict(SPECIAL.get(module, {}))
    return config | ({"model_type": module} if "model_type" in names and module != "bailing_moe_v3" else {})


def write_checkpoint(module: str, folder: Path, bits: int | None = 4, seed: int = 0, **changes: Any) -> None:
    """Write a small random checkpoint, as MLX-LM's conversion does.

    Args:
        module: the name of MLX-LM's file.
        folder: the folder of the checkpoint.
        bits: the width of matrices; None for f32 weights.
        seed: the seed of the weights.
        changes: values that replace those of the small config.
    """
    config = small_config(module) | changes
    model_class, args_class = model_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.random.seed(seed)

    def drawn(path: str, array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        if array.ndim == 1:
            return 1 + 0.1 * mx.random.normal(array.shape)
        return mx.random.normal(array.shape) * array.shape[-1] ** -0.5

    model.update(tree_map_with_path(drawn, model.parameters()))
    if bits is not None:
        own = getattr(model, "quant_predicate", None)

        def quantized(path: str, part: nn.Module) -> Any:
            if not hasattr(part, "to_quantized") or part.weight.shape[-1] % 32:
                return False
            return own(path, part) if own is not None else True

        nn.quantize(model, 32, bits, class_predicate=quantized)
        config["quantization"] = {"group_size": 32, "bits": bits}
        for path, part in model.named_modules():
            if hasattr(part, "bits") and (part.bits, part.group_size) != (bits, 32):
                config["quantization"][path] = {"group_size": part.group_size, "bits": part.bits}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
