"""Geometries of published models, so that their needs can be estimated without a network.

Sources: ``config.json`` of Qwen/Qwen3.5-397B-A17B, 122B-A10B, 35B-A3B and the model cards of Qwen/Qwen3.6-35B-A3B and
Qwen/Qwen3.8-2.4T-A95B on the Hugging Face hub.
"""

import re
from collections.abc import Mapping
from typing import Any

_COMMON: Mapping[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 248320,
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
    hidden_size: int,
    layers: int,
    heads: int,
    value_heads: int,
    experts: int,
    experts_per_token: int,
    expert_size: int,
    kv_heads: int = 2,
) -> Mapping[str, Any]:
    return {
        **_COMMON,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
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
    "Qwen3.6-35B-A3B": _published(2048, 40, 16, 32, 256, 8, 512),
    "Qwen3.8-2.4T-A95B": _published(8192, 92, 64, 128, 512, 10, 2048, kv_heads=4),
}
"""The fields of ``config.json`` that decide sizes, by the name of the model."""

_OTHER_GEOMETRY = re.compile(r"(?:^|[-_./])(?:REAP|pruned?|merged?|upscaled?|tiny|draft)(?=$|[-_.\d])", re.IGNORECASE)
"""Words in the names of models that were derived from a published one and have other sizes."""
_WIDTH = re.compile(r"[-_]([234568])-?bits?(?=$|[-_])", re.IGNORECASE)
_SAME_WEIGHTS = re.compile(
    r"(?:[-_.](?:mlx|bf16|fp16|f16|hf|text|instruct|thinking|dwq|[234568]-?bits?))*", re.IGNORECASE
)
"""Endings of a model's name that change neither its sizes nor, but for the width, its format."""


def known_config(name: str) -> Mapping[str, Any] | None:
    """Return the config of a model whose name, or hub id, says that it is one of ``PUBLISHED`` or made of it.

    A width in the name ("-8bit") becomes that of an MLX conversion.
    """
    known = _known(name)
    if known is None:
        return None
    width = _WIDTH.search(name)
    made = {} if width is None else {"quantization": {"bits": int(width[1]), "group_size": 64, "mode": "affine"}}
    return {**PUBLISHED[known], **made}


def is_plain_name(name: str) -> bool:
    """Whether ``known_config`` certainly holds for ``name``: it is a published name, with harmless endings at most."""
    known = _known(name)
    return (
        known is not None
        and _SAME_WEIGHTS.fullmatch(name[name.lower().index(known.lower()) + len(known) :]) is not None
    )


def original_of(name: str) -> str | None:
    """Return the hub id of the checkpoint that a conversion, by its name, was made of; None if it is not known."""
    known = _known(name)
    return None if known is None else f"Qwen/{known}"


def _known(name: str) -> str | None:
    if _OTHER_GEOMETRY.search(name):
        return None
    for known in PUBLISHED:
        if re.search(rf"(?:^|[/_]){re.escape(known)}(?:[-_.]|$)", name, re.IGNORECASE):
            return known
    return None
