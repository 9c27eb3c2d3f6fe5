"""Configurations of models with GatedDeltaNet in most layers and full attention with output gates in all other layers.

Qwen3.5-MoE and Qwen3-Next have these layers. Sources: transformers ``Qwen3_5MoeTextConfig`` and ``Qwen3NextConfig``
(field names and defaults).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.fields import Reader, shown
from flashmoe_mlx.layers.rope import Rope, read_rope
from flashmoe_mlx.models.blocks import AttentionBlock, GatedDeltaNetBlock, MixerBlock
from flashmoe_mlx.models.config import (
    MOST_EXPERTS,
    MOST_LAYERS,
    ModelConfig,
    context_with_yarn,
    refuse_too_many_chosen,
    refuse_unequal_division,
)
from flashmoe_mlx.models.feed_forward import FeedForwardBlock, MoeBlock
from flashmoe_mlx.models.parameters import Kind

_LAYER_TYPES = {"full_attention": True, "linear_attention": False}
_ROTARY_FRACTION = 0.25


@dataclass(frozen=True, slots=True)
class HybridConfig(ModelConfig):
    """The sizes of a model."""

    norm: ClassVar[Kind] = Kind.NORM
    interleaved: ClassVar[bool] = False
    """See ``GatedDeltaNetBlock``."""

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
            self.interleaved,
        )

    def feed_forward(self, layer: int) -> FeedForwardBlock:  # noqa: ARG002  # equal in all layers
        """Return the mixture of experts."""
        return self.mixture()

    def mixture(self) -> MoeBlock:
        """Return the mixture of experts of a layer; the weights of a token's routed experts sum to 1."""
        return MoeBlock(self.hidden_size, self.num_experts, self.shared_expert_size, self.rms_norm_eps, self.norm)


def read_sizes(text: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Read the fields of ``HybridConfig`` from the text model's part of a ``config.json``.

    Args:
        text: the part.
        tied: whether the head is the embedding.

    Raises:
        CheckpointError: a value is missing, mistyped or out of range.
    """
    read = Reader(text)
    num_layers = read.size("num_hidden_layers", most=MOST_LAYERS)
    head_dim = read.size("head_dim", 256)
    max_context = read.size("max_position_embeddings", 32768)
    rope = read_rope(text, head_dim, max_context, _ROTARY_FRACTION)
    return {
        "num_layers": num_layers,
        "hidden_size": read.size("hidden_size"),
        "vocab_size": read.size("vocab_size"),
        "max_context": context_with_yarn(max_context, rope),
        "rms_norm_eps": read.number("rms_norm_eps", 1e-6, most=1.0),
        "tie_word_embeddings": tied,
        "full_attention": _full_attention(text, num_layers, read),
        "num_heads": read.size("num_attention_heads"),
        "num_kv_heads": read.size("num_key_value_heads"),
        "head_dim": head_dim,
        "rope": rope,
        "attention_bias": read.flag("attention_bias", False),
        "linear_key_heads": read.size("linear_num_key_heads"),
        "linear_value_heads": read.size("linear_num_value_heads"),
        "linear_key_dim": read.size("linear_key_head_dim"),
        "linear_value_dim": read.size("linear_value_head_dim"),
        "linear_conv_kernel": read.size("linear_conv_kernel_dim", 4, least=2),
        "num_experts": read.size("num_experts", most=MOST_EXPERTS),
        "experts_per_token": read.size("num_experts_per_tok"),
        "expert_size": read.size("moe_intermediate_size"),
        "shared_expert_size": read.size("shared_expert_intermediate_size"),
    }


def refuse_impossible(config: HybridConfig) -> None:
    """Raise CheckpointError if the sizes of a model contradict each other."""
    refuse_unequal_division(config.num_heads, config.num_kv_heads, "num_attention_heads by num_key_value_heads")
    refuse_unequal_division(
        config.linear_value_heads, config.linear_key_heads, "linear_num_value_heads by linear_num_key_heads"
    )
    refuse_too_many_chosen(config)


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


def write_sizes(model_type: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``config.json`` of a model of ``model_type`` from sizes under the names of ``HybridConfig``."""
    return {
        "model_type": model_type,
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
