"""Models of the native families in transformers, with random sizes and weights."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from numpy.random import Generator

_FULL, _LINEAR = "full_attention", "linear_attention"


def random_model(family: str, seed: int) -> Any:
    """Return a model of ``family``, in float32 and with transformers' reference implementations."""
    random = np.random.default_rng([*family.encode(), seed])
    make, config_class, model_class = _FAMILIES[family]
    config = config_class(**_common(random), **make(random))
    config._attn_implementation = config._experts_implementation = "eager"
    model = model_class(config).eval().float()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_values(name, weight, config.tie_word_embeddings))
    return model


def _values(name: str, weight: torch.Tensor, tied: bool) -> torch.Tensor:
    """Draw a parameter in such a way that all parts of the model change its logits."""
    drawn = torch.randn_like(weight)
    if "norm" in name:
        return weight + 0.2 * drawn
    if "A_log" in name:
        return torch.empty_like(weight).uniform_(-4, 1)
    if "conv1d" in name or "bias" in name:
        return 0.5 * drawn
    if "ngram_embedding" in name or "embed_tokens" in name:
        return drawn * weight.shape[-1] ** -0.5 if tied else drawn
    return drawn * weight.shape[-1] ** -0.5 * (2 if "lm_head" in name or ".gate.weight" in name else 1)


def _common(random: Generator) -> dict[str, Any]:
    kv_heads, experts = int(random.choice([1, 2, 3, 5])), int(random.choice([1, 2, 7, 16, 33]))
    return {
        "vocab_size": int(random.choice([61, 128, 257])),
        "hidden_size": int(random.choice([32, 48, 80, 100, 160])),
        "num_attention_heads": kv_heads * int(random.choice([1, 2, 7])),
        "num_key_value_heads": kv_heads,
        "num_experts": experts,
        "num_experts_per_tok": int(random.integers(1, min(experts, 11) + 1)),
        "moe_intermediate_size": int(random.choice([16, 40, 72, 96])),
        "rms_norm_eps": float(random.choice([1e-6, 1e-2])),
        "tie_word_embeddings": bool(random.integers(2)),
        "max_position_embeddings": int(random.choice([64, 4096])),
        "attention_bias": bool(random.integers(2)),
        "pad_token_id": None,
        "bos_token_id": None,
    }


def _rope(random: Generator, share: bool, yarn: bool = True) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(random.choice([1e4, 5e6]))}
    if share:
        rope["partial_rotary_factor"] = float(random.choice([0.25, 0.5, 1.0]))
    if yarn and random.integers(2):
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": int(random.choice([16, 256]))}
        rope |= [{}, {"attention_factor": 1.2}, {"truncate": False}, {"beta_fast": 16.0}][int(random.integers(4))]
    return rope


def _heads(random: Generator, share: bool) -> dict[str, Any]:
    return {
        "head_dim": int(random.choice([16, 24, 48, 80, 128])),
        "norm_topk_prob": bool(random.integers(2)),
        "rope_parameters": _rope(random, share),
    }


def _layers(random: Generator, linear: bool = True) -> dict[str, Any]:
    """Return the number of layers, and their types, with at least one layer of full attention."""
    number = int(random.integers(1, 6))
    if not linear:
        return {"num_hidden_layers": number}
    types = [str(random.choice([_LINEAR, _FULL])) for _ in range(number)]
    types[int(random.integers(number))] = _FULL
    key_heads = int(random.choice([1, 2, 3]))
    return {
        "num_hidden_layers": number,
        "layer_types": types,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * int(random.choice([1, 2, 3])),
        "linear_key_head_dim": int(random.choice([16, 48, 64])),
        "linear_value_head_dim": int(random.choice([16, 32, 48])),
        "linear_conv_kernel_dim": int(random.choice([2, 3, 4])),
        "shared_expert_intermediate_size": int(random.choice([16, 24, 72])),
    }


def _mlps(random: Generator, layers: int) -> dict[str, Any]:
    """Return the layers without experts; at least one layer has experts."""
    step, without = int(random.choice([1, 1, 2, 3])), [int(random.integers(layers))] if random.integers(2) else []
    if not any(layer not in without and (layer + 1) % step == 0 for layer in range(layers)):
        step, without = 1, []
    return {"decoder_sparse_step": step, "mlp_only_layers": without, "intermediate_size": int(random.choice([24, 104]))}


def _qwen3_moe(random: Generator) -> dict[str, Any]:
    layers = _layers(random, linear=False)
    return layers | _mlps(random, layers["num_hidden_layers"]) | _heads(random, share=False)


def _qwen3_next(random: Generator) -> dict[str, Any]:
    layers = _layers(random)
    return layers | _mlps(random, layers["num_hidden_layers"]) | _heads(random, share=True)


def _qwen3_5_moe(random: Generator) -> dict[str, Any]:
    rope = _rope(random, share=True) | {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
    return _layers(random) | {"head_dim": int(random.choice([32, 48, 96])), "rope_parameters": rope}


def _qwen4_exp(random: Generator) -> dict[str, Any]:
    layers = _layers(random)
    linear = [index + 1 for index, kind in enumerate(layers["layer_types"]) if kind == _LINEAR]
    tables = random.choice(linear, size=2).tolist() if linear and random.integers(4) else []
    grams, hashes = int(random.choice([2, 3, 5])), int(random.choice([1, 2, 4]))
    block, head_dim = int(random.choice([1, 2, 4, 7])), int(random.choice([24, 32, 56, 128]))
    rope = _rope(random, share=True, yarn=False) | {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
    return layers | {
        "head_dim": head_dim,
        "rope_parameters": rope,
        "eos_token_id": 3,
        "norm_topk_prob": bool(random.integers(2)),
        "output_gate_type": str(random.choice(["sigmoid", "silu"])),
        "hc_count": int(random.choice([2, 3, 5])),
        "hc_lowrank": int(random.choice([1, 7, 32])),
        "indexer_n_heads": int(random.choice([1, 3, 8])),
        "indexer_kv_heads": 1,
        "indexer_head_dim": head_dim * int(random.choice([1, 2])),
        "indexer_budget": block * int(random.choice([1, 3, 6, 60])),
        "indexer_compress_ratio": block,
        "ple_layer_ids": sorted(set(tables)),
        "ple_embed_dim": (grams - 1) * hashes * int(random.choice([4, 20, 32])),
        "ple_conv_kernel_size": int(random.choice([2, 5])),
        "ngram_size": grams,
        "heads_per_ngram": hashes,
        "ngram_vocab_size_base": int(random.choice([7, 200])),
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": int(random.choice([1, 2, 8])),
    }


_FAMILIES: Mapping[str, tuple[Callable[[Generator], dict[str, Any]], Any, Any]] = {
    "qwen3_5_moe": (_qwen3_5_moe, transformers.Qwen3_5MoeTextConfig, transformers.Qwen3_5MoeForCausalLM),
    "qwen3_moe": (_qwen3_moe, transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "qwen3_next": (_qwen3_next, transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM),
    "qwen4_exp": (_qwen4_exp, transformers.Qwen4ExpTextConfig, transformers.Qwen4ExpForCausalLM),
}
FAMILIES = tuple(_FAMILIES)
