"""Qwen3-MoE and Qwen3-Coder: full attention without output gates, and experts without a shared expert.

Sources: transformers ``Qwen3MoeConfig`` (field names and defaults) and ``modeling_qwen3_moe.py``; mlx_lm
``models/qwen3_moe.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe_mlx.formats.fields import Reader, refuse_other_arithmetic
from flashmoe_mlx.layers.rope import Rope, read_rope
from flashmoe_mlx.models.blocks import AttentionBlock
from flashmoe_mlx.models.config import (
    MOST_LAYERS,
    ModelConfig,
    context_with_yarn,
    read_mlp_layers,
    read_num_experts,
    read_tied,
    refuse_too_many_chosen,
    refuse_unequal_division,
)
from flashmoe_mlx.models.family import Family, TensorNames
from flashmoe_mlx.models.feed_forward import FeedForwardBlock, MlpBlock, MoeBlock

_COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attn_output_gate": (False,),
    "scoring_func": ("softmax",),
    "qk_norm": (True,),
    "use_qk_norm": (True,),
    "qkv_bias": (False,),
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
}
"""Values of fields that choose the arithmetic; a field that is absent or null has the first value."""
_READ = ("attention_bias", "rms_norm_eps", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")


@dataclass(frozen=True, slots=True)
class Qwen3MoeConfig(ModelConfig):
    """The sizes of a model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    attention_bias: bool
    renormalized: bool
    """Whether the weights of a token's routed experts sum to 1."""
    mlp_layers: tuple[int, ...]
    """Layers with an MLP in place of experts."""
    mlp_size: int
    """The inner width of these MLPs."""

    def mixer(self, layer: int) -> AttentionBlock:  # noqa: ARG002  # equal in all layers
        """Return full attention."""
        return AttentionBlock(
            self.hidden_size,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.rope,
            self.attention_bias,
            self.rms_norm_eps,
            self.norm,
            gated=False,
        )

    def feed_forward(self, layer: int) -> FeedForwardBlock:
        """Return the mixture of experts, or an MLP."""
        if layer in self.mlp_layers:
            return MlpBlock(self.hidden_size, self.mlp_size, self.rms_norm_eps, self.norm)
        return MoeBlock(self.hidden_size, self.num_experts, 0, self.rms_norm_eps, self.norm, self.renormalized)


def _parse_config(published: Mapping[str, Any]) -> Qwen3MoeConfig:
    refuse_other_arithmetic(published, _COMPUTED, read=_READ)
    read = Reader(published)
    num_layers, hidden_size = read.size("num_hidden_layers", most=MOST_LAYERS), read.size("hidden_size")
    num_heads, max_context = read.size("num_attention_heads"), read.size("max_position_embeddings", 32768)
    head_dim = read.size("head_dim", max(1, hidden_size // num_heads))
    rope = read_rope(published, head_dim, max_context, fraction=1.0)
    mlp_layers = read_mlp_layers(published, num_layers)
    config = Qwen3MoeConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=read.size("vocab_size"),
        max_context=context_with_yarn(max_context, rope),
        rms_norm_eps=read.number("rms_norm_eps", 1e-6, most=1.0),
        tie_word_embeddings=read_tied(published, published),
        num_experts=read_num_experts(published),
        experts_per_token=read.size("num_experts_per_tok"),
        expert_size=read.size("moe_intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=read.size("num_key_value_heads"),
        head_dim=head_dim,
        rope=rope,
        attention_bias=read.flag("attention_bias", False),
        renormalized=read.flag("norm_topk_prob", False),
        mlp_layers=mlp_layers,
        mlp_size=read.size("intermediate_size") if mlp_layers else 0,
    )
    refuse_unequal_division(config.num_heads, config.num_kv_heads, "num_attention_heads by num_key_value_heads")
    refuse_too_many_chosen(config)
    return config


def _write_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["hidden_size"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"],
        "num_key_value_heads": sizes["num_kv_heads"],
        "head_dim": sizes["head_dim"],
        "num_experts": sizes["num_experts"],
        "num_experts_per_tok": sizes["experts_per_token"],
        "moe_intermediate_size": sizes["expert_size"],
        "norm_topk_prob": sizes.get("renormalized", True),
        "mlp_only_layers": list(sizes.get("mlp_layers", ())),
        "intermediate_size": sizes.get("mlp_size") or 8 * sizes["expert_size"],
        "max_position_embeddings": sizes["max_context"],
        "tie_word_embeddings": False,
        "rope_theta": sizes["rope"]["theta"] if "rope" in sizes else 1e6,
    }


def _published(
    hidden_size: int,
    num_layers: int,
    heads: tuple[int, int],
    experts: int,
    expert_size: int,
    context: int,
    theta: float,
) -> Mapping[str, Any]:
    """Return the ``config.json`` of a published model; ``heads`` are those of queries, and of keys and values."""
    return _write_config({
        "vocab_size": 151936,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": heads[0],
        "num_kv_heads": heads[1],
        "head_dim": 128,
        "num_experts": experts,
        "experts_per_token": 8,
        "expert_size": expert_size,
        "max_context": context,
        "rope": {"theta": theta},
    })  # fmt: skip


_30B = (2048, 48, (32, 4), 128, 768)
_235B = (4096, 94, (64, 4), 128, 1536)
_LONG = 262144

FAMILY = Family(
    model_types=("qwen3_moe",),
    series=("Qwen3", "Qwen3-Coder"),
    example="Qwen3-30B-A3B",
    config=Qwen3MoeConfig,
    parse_config=_parse_config,
    write_config=_write_config,
    tensor_names=TensorNames(),
    tool_format="hermes",
    # Sources: config.json of Qwen3-30B, Qwen3-235B and Qwen3-Coder-480B, and the model cards on the Hugging Face hub.
    published={
        "Qwen/Qwen3-Coder-480B-A35B-Instruct": _published(6144, 62, (96, 8), 160, 2560, _LONG, 1e7),
        "Qwen/Qwen3-Coder-30B-A3B-Instruct": _published(*_30B, _LONG, 1e7),
        "Qwen/Qwen3-235B-A22B-Instruct-2507": _published(*_235B, _LONG, 5e6),
        "Qwen/Qwen3-235B-A22B-Thinking-2507": _published(*_235B, _LONG, 5e6),
        "Qwen/Qwen3-30B-A3B-Instruct-2507": _published(*_30B, _LONG, 1e7),
        "Qwen/Qwen3-30B-A3B-Thinking-2507": _published(*_30B, _LONG, 1e7),
        "Qwen/Qwen3-235B-A22B": _published(*_235B, 40960, 1e6),
        "Qwen/Qwen3-30B-A3B": _published(*_30B, 40960, 1e6),
    },
)
