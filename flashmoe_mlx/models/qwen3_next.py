"""Qwen3-Next and Qwen3-Coder-Next: the layers of Qwen3.5-MoE under other names.

The input projections of GatedDeltaNet are two matrices, whose rows are sorted by key head. Sources: transformers
``Qwen3NextConfig`` and ``modeling_qwen3_next.py``; mlx_lm ``models/qwen3_next.py``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from flashmoe_mlx.formats.fields import Reader, refuse_other_arithmetic
from flashmoe_mlx.models.config import read_mlp_layers, read_tied
from flashmoe_mlx.models.family import Family, TensorNames
from flashmoe_mlx.models.feed_forward import FeedForwardBlock, MlpBlock
from flashmoe_mlx.models.hybrid import HybridConfig, read_sizes, refuse_impossible, write_sizes

_COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attn_output_gate": (True,),
    "output_gate_type": ("silu", "swish"),
    "scoring_func": ("softmax",),
    "qk_norm": (True,),
    "use_qk_norm": (True,),
    "n_shared_experts": (1,),
    "num_shared_experts": (1,),
}
"""Values of fields that choose the arithmetic; a field that is absent or null has the first value."""
_READ = ("attention_bias", "rms_norm_eps", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")


@dataclass(frozen=True, slots=True)
class Qwen3NextConfig(HybridConfig):
    """The sizes of a model."""

    interleaved: ClassVar[bool] = True

    renormalized: bool
    """Whether the weights of a token's routed experts sum to 1."""
    mlp_layers: tuple[int, ...]
    """Layers with an MLP in place of experts."""
    mlp_size: int
    """The inner width of these MLPs."""

    def feed_forward(self, layer: int) -> FeedForwardBlock:
        """Return the mixture of experts, or an MLP."""
        if layer in self.mlp_layers:
            return MlpBlock(self.hidden_size, self.mlp_size, self.rms_norm_eps, self.norm)
        return replace(self.mixture(), renormalized=self.renormalized)


def _parse_config(published: Mapping[str, Any]) -> Qwen3NextConfig:
    refuse_other_arithmetic(published, _COMPUTED, read=_READ)
    read, sizes = Reader(published), read_sizes(published, read_tied(published, published))
    mlp_layers = read_mlp_layers(published, sizes["num_layers"])
    config = Qwen3NextConfig(
        **sizes,
        renormalized=read.flag("norm_topk_prob", True),
        mlp_layers=mlp_layers,
        mlp_size=read.size("intermediate_size", 5632) if mlp_layers else 0,
    )
    refuse_impossible(config)
    return config


def _write_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **write_sizes("qwen3_next", sizes),
        "norm_topk_prob": sizes.get("renormalized", True),
        "mlp_only_layers": list(sizes.get("mlp_layers", ())),
        "intermediate_size": sizes.get("mlp_size") or 10 * sizes["expert_size"],
    }


_80B = _write_config({
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_layers": 48,
    "num_heads": 16,
    "num_kv_heads": 2,
    "head_dim": 256,
    "linear_key_heads": 16,
    "linear_value_heads": 32,
    "linear_key_dim": 128,
    "linear_value_dim": 128,
    "num_experts": 512,
    "experts_per_token": 10,
    "expert_size": 512,
    "shared_expert_size": 512,
    "max_context": 262144,
})  # fmt: skip

FAMILY = Family(
    model_types=("qwen3_next",),
    series=("Qwen3-Next", "Qwen3-Coder-Next"),
    example="Qwen3-Next-80B-A3B-Instruct",
    config=Qwen3NextConfig,
    parse_config=_parse_config,
    write_config=_write_config,
    # The prediction of further tokens, and tables that old versions of transformers saved.
    tensor_names=TensorNames(skipped=re.compile(r"^mtp\.|\.rotary_emb\.inv_freq$")),
    tool_format="hermes",
    # Source: the model cards on the Hugging Face hub.
    published={
        "Qwen/Qwen3-Next-80B-A3B-Instruct": _80B,
        "Qwen/Qwen3-Next-80B-A3B-Thinking": _80B,
        "Qwen/Qwen3-Coder-Next": _80B,
    },
)
