"""Qwen3.5-MoE, and Qwen3.6 and Qwen3.8 of the same architecture.

GatedDeltaNet in three layers of four, full attention with an output gate in the fourth, and in each layer a mixture of
experts with one shared expert. Sources: transformers ``Qwen3_5MoeTextConfig`` (field names and defaults) and
``modeling_qwen3_5_moe.py``; mlx_lm ``models/qwen3_5_moe.py``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.fields import Reader, refuse_other_arithmetic, shown
from flashmoe_mlx.layers.rope import Rope, read_rope
from flashmoe_mlx.models.blocks import AttentionBlock, GatedDeltaNetBlock, MixerBlock, MoeBlock
from flashmoe_mlx.models.config import (
    MOST_EXPERTS,
    MOST_LAYERS,
    ModelConfig,
    context_with_yarn,
    read_tied,
    refuse_too_many_chosen,
    refuse_unequal_division,
    text_part,
)
from flashmoe_mlx.models.family import Family, TensorNames
from flashmoe_mlx.models.parameters import Kind

_LAYER_TYPES = {"full_attention": True, "linear_attention": False}
_ROTARY_FRACTION = 0.25
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
class Qwen35MoeConfig(ModelConfig):
    """The sizes of a model."""

    norm: ClassVar[Kind] = Kind.NORM

    full_attention: tuple[bool, ...]
    """For each layer: True for full attention, False for GatedDeltaNet."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    attention_bias: bool

    linear_key_heads: int
    linear_value_heads: int
    linear_key_dim: int
    linear_value_dim: int
    linear_conv_kernel: int

    shared_expert_size: int

    def mixer(self, layer: int) -> MixerBlock:
        """Return full attention or GatedDeltaNet."""
        if self.full_attention[layer]:
            return AttentionBlock(
                self.hidden_size,
                self.num_heads,
                self.num_kv_heads,
                self.head_dim,
                self.rope,
                self.attention_bias,
                self.rms_norm_eps,
                self.norm,
            )
        return GatedDeltaNetBlock(
            self.hidden_size,
            self.linear_key_heads,
            self.linear_value_heads,
            self.linear_key_dim,
            self.linear_value_dim,
            self.linear_conv_kernel,
            self.rms_norm_eps,
        )

    def experts(self, layer: int) -> MoeBlock:  # noqa: ARG002  # equal in all layers
        """Return the mixture of experts."""
        return MoeBlock(self.hidden_size, self.num_experts, self.shared_expert_size, self.rms_norm_eps, self.norm)


def _parse_config(published: Mapping[str, Any]) -> Qwen35MoeConfig:
    text = text_part(published)
    refuse_other_arithmetic(text, _COMPUTED, read=("attention_bias", "rms_norm_eps"))
    read = Reader(text)
    num_layers = read.size("num_hidden_layers", most=MOST_LAYERS)
    head_dim = read.size("head_dim", 256)
    max_context = read.size("max_position_embeddings", 32768)
    rope = read_rope(text, head_dim, max_context, _ROTARY_FRACTION)
    config = Qwen35MoeConfig(
        num_layers=num_layers,
        hidden_size=read.size("hidden_size"),
        vocab_size=read.size("vocab_size"),
        max_context=context_with_yarn(max_context, rope),
        rms_norm_eps=read.number("rms_norm_eps", 1e-6, most=1.0),
        tie_word_embeddings=read_tied(published, text),
        full_attention=_full_attention(text, num_layers, read),
        num_heads=read.size("num_attention_heads"),
        num_kv_heads=read.size("num_key_value_heads"),
        head_dim=head_dim,
        rope=rope,
        attention_bias=read.flag("attention_bias", False),
        linear_key_heads=read.size("linear_num_key_heads"),
        linear_value_heads=read.size("linear_num_value_heads"),
        linear_key_dim=read.size("linear_key_head_dim"),
        linear_value_dim=read.size("linear_value_head_dim"),
        linear_conv_kernel=read.size("linear_conv_kernel_dim", 4, least=2),
        num_experts=read.size("num_experts", most=MOST_EXPERTS),
        experts_per_token=read.size("num_experts_per_tok"),
        expert_size=read.size("moe_intermediate_size"),
        shared_expert_size=read.size("shared_expert_intermediate_size"),
    )
    refuse_unequal_division(config.num_heads, config.num_kv_heads, "num_attention_heads by num_key_value_heads")
    refuse_unequal_division(
        config.linear_value_heads, config.linear_key_heads, "linear_num_value_heads by linear_num_key_heads"
    )
    refuse_too_many_chosen(config)
    return config


def _full_attention(text: Mapping[str, Any], num_layers: int, read: Reader) -> tuple[bool, ...]:
    kinds = text.get("layer_types")
    if kinds is None:
        interval = read.size("full_attention_interval", 4)
        return tuple((layer + 1) % interval == 0 for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise CheckpointError(f"config.json: layer_types must list {num_layers} layers", code="invalid_config")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _LAYER_TYPES:
            raise CheckpointError(
                f"config.json: layer type {shown(kind)} is not supported; supported: {', '.join(_LAYER_TYPES)}",
                code="invalid_config",
            )
    return tuple(_LAYER_TYPES[kind] for kind in kinds)


def _write_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["hidden_size"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"],
        "num_key_value_heads": sizes["num_kv_heads"],
        "head_dim": sizes["head_dim"],
        "full_attention_interval": 4,
        "linear_num_key_heads": sizes["linear_key_heads"],
        "linear_num_value_heads": sizes["linear_value_heads"],
        "linear_key_head_dim": sizes["linear_key_dim"],
        "linear_value_head_dim": sizes["linear_value_dim"],
        "num_experts": sizes["num_experts"],
        "num_experts_per_tok": sizes["experts_per_token"],
        "moe_intermediate_size": sizes["expert_size"],
        "shared_expert_intermediate_size": sizes["shared_expert_size"],
        "max_position_embeddings": sizes["max_context"],
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": _ROTARY_FRACTION},
    }


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
