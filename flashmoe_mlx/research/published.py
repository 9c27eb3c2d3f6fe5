"""Geometries of published models, so that their needs can be told without a network.

Source: the config.json of Qwen/Qwen3.5-397B-A17B, 122B-A10B and 35B-A3B on the Hugging Face hub.
"""

import re
from collections.abc import Mapping
from typing import Any

_COMMON: Mapping[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 248320,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 262144,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
}


def _published(
    hidden_size: int, layers: int, heads: int, value_heads: int, experts: int, experts_per_token: int, expert_size: int
) -> Mapping[str, Any]:
    return {
        **_COMMON,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "linear_num_value_heads": value_heads,
        "num_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "moe_intermediate_size": expert_size,
        "shared_expert_intermediate_size": expert_size,
    }


PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "Qwen3.5-397B-A17B": _published(4096, 60, 32, 64, 512, 10, 1024),
    "Qwen3.5-122B-A10B": _published(3072, 48, 32, 64, 256, 8, 1024),
    "Qwen3.5-35B-A3B": _published(2048, 40, 16, 32, 256, 8, 512),
}
"""``config.json`` by name, what decides sizes."""


def known_config(name: str) -> Mapping[str, Any] | None:
    """The config of a model whose name, or hub id, says that it is one of them, conversions included."""
    for known, config in PUBLISHED.items():
        if re.search(rf"(?:^|/){re.escape(known)}(?:-|$)", name, re.IGNORECASE):
            return config
    return None
