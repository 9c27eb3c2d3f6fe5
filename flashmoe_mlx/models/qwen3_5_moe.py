"""Qwen3.5-MoE, and Qwen3.6 and Qwen3.8 of the same architecture.

GatedDeltaNet in three layers of four, full attention with an output gate in the fourth, and in each layer a mixture of
experts with one shared expert. Sources: transformers ``Qwen3_5MoeTextConfig`` (field names and defaults) and
``modeling_qwen3_5_moe.py``; mlx_lm ``models/qwen3_5_moe.py``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe_mlx.formats.fields import refuse_other_arithmetic
from flashmoe_mlx.models.config import read_tied, text_part
from flashmoe_mlx.models.family import Family, TensorNames
from flashmoe_mlx.models.hybrid import HybridConfig, read_sizes, refuse_impossible, write_sizes

_COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attn_output_gate": (True,),
    # The gated norm after GatedDeltaNet; the gate of attention is a sigmoid in every model of this family.
    "output_gate_type": ("silu", "swish"),
    "norm_topk_prob": (True,),
    "scoring_func": ("softmax",),
    "topk_method": ("greedy",),
    "qk_norm": (True,),
    "use_qk_norm": (True,),
    "n_shared_experts": (1,),
    "num_shared_experts": (1,),
}
"""Values of fields that choose the arithmetic; a field that is absent or null has the first value."""


@dataclass(frozen=True, slots=True)
class Qwen35MoeConfig(HybridConfig):
    """The sizes of a model."""


def _parse_config(published: Mapping[str, Any]) -> Qwen35MoeConfig:
    text = text_part(published)
    refuse_other_arithmetic(text, _COMPUTED, read=("attention_bias", "rms_norm_eps"))
    config = Qwen35MoeConfig(**read_sizes(text, read_tied(published, text)))
    refuse_impossible(config)
    return config


def _write_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return write_sizes("qwen3_5_moe_text", sizes)


def _published(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    linear_value_heads: int,
    num_experts: int,
    experts_per_token: int,
    expert_size: int,
    num_kv_heads: int = 2,
) -> Mapping[str, Any]:
    """Return the ``config.json`` of a published model; arguments are fields of ``Qwen35MoeConfig``."""
    return _write_config({
        "vocab_size": 248320,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": 256,
        "linear_key_heads": 16,
        "linear_value_heads": linear_value_heads,
        "linear_key_dim": 128,
        "linear_value_dim": 128,
        "num_experts": num_experts,
        "experts_per_token": experts_per_token,
        "expert_size": expert_size,
        "shared_expert_size": expert_size,
        "max_context": 262144,
    })  # fmt: skip


FAMILY = Family(
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    series=("Qwen3.5", "Qwen3.6", "Qwen3.8"),
    example="Qwen3.5-35B-A3B",
    config=Qwen35MoeConfig,
    parse_config=_parse_config,
    write_config=_write_config,
    tensor_names=TensorNames(
        prefixes=(
            ("language_model.model.", "model."),
            ("model.language_model.", "model."),
            ("language_model.lm_head.", "lm_head."),
        ),
        # The vision tower, the prediction of further tokens, and tables that old versions of transformers saved.
        skipped=re.compile(r"^(model\.|language_model\.)?(visual|vision_tower|mtp)\.|\.mtp\.|\.rotary_emb\.inv_freq$"),
    ),
    tool_format="qwen_xml",
    # Sources: config.json of the Qwen3.5 models and the model cards of Qwen3.6 and Qwen3.8 on the Hugging Face hub.
    published={
        "Qwen/Qwen3.5-397B-A17B": _published(4096, 60, 32, 64, 512, 10, 1024),
        "Qwen/Qwen3.5-122B-A10B": _published(3072, 48, 32, 64, 256, 8, 1024),
        "Qwen/Qwen3.5-35B-A3B": _published(2048, 40, 16, 32, 256, 8, 512),
        "Qwen/Qwen3.6-35B-A3B": _published(2048, 40, 16, 32, 256, 8, 512),
        "Qwen/Qwen3.8-2.4T-A95B": _published(8192, 92, 64, 128, 512, 10, 2048, num_kv_heads=4),
    },
)
