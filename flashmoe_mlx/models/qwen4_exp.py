"""Qwen3.8-Flash-Next: the mixers and experts of Qwen3.5-MoE between four residual streams.

Full attention is sparse in long sequences, and one layer adds embeddings of n-grams from a table in storage. Sources:
transformers ``Qwen4ExpTextConfig`` (field names and defaults), ``modeling_qwen4_exp.py``, and ``conversion_mapping.py``
for the parts of the table; mlx_lm ``models/qwen4_exp.py`` and mlx-vlm ``models/qwen4_exp`` for the names and norms of
MLX conversions.
"""

import re
from collections.abc import Mapping
from typing import Any

from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.fields import Reader, refuse_other_arithmetic, shown
from flashmoe_mlx.models.config import read_tied, refuse_unequal_division, text_part
from flashmoe_mlx.models.family import Family, TensorNames
from flashmoe_mlx.models.hybrid import read_sizes, refuse_impossible, write_sizes
from flashmoe_mlx.models.hyper_build import build_hyper_model
from flashmoe_mlx.models.hyper_config import HyperConfig

_COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attn_output_gate": (True,),
    "output_gate_type": ("silu", "swish", "sigmoid"),
    "scoring_func": ("softmax",),
    "qk_norm": (True,),
    "use_qk_norm": (True,),
    "n_shared_experts": (1,),
    "num_shared_experts": (1,),
    "indexer_kv_heads": (1,),
}
"""Values of fields that choose the arithmetic; a field that is absent or null has the first value."""
_READ = (
    "attention_bias", "rms_norm_eps", "norm_topk_prob", "hc_count", "hc_lowrank", "ple_layer_ids", "ple_embed_dim",
    "ple_conv_kernel_size", "ngram_size", "heads_per_ngram", "ngram_vocab_size_base",
    "make_ngram_vocab_size_divisible_by", "split_ngram_parts", "indexer_n_heads", "indexer_head_dim", "indexer_budget",
    "indexer_compress_ratio",
)  # fmt: skip
_MOST_ROWS = 2**31
_NOT_LINEAR = "indexed_attention"
"""The name of full attention in configs that transformers saved."""


def _parse_config(published: Mapping[str, Any]) -> HyperConfig:
    text = text_part(published)
    refuse_other_arithmetic(text, _COMPUTED, read=_READ)
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        kinds = ["full_attention" if kind == _NOT_LINEAR else kind for kind in kinds]
    sizes, read = read_sizes({**text, "layer_types": kinds}, read_tied(published, text)), Reader(text)
    budget, block = read.size("indexer_budget"), read.size("indexer_compress_ratio")
    refuse_unequal_division(budget, block, "indexer_budget by indexer_compress_ratio")
    config = HyperConfig(
        **sizes,
        sigmoid_gate=text.get("output_gate_type") == "sigmoid",
        renormalized=read.flag("norm_topk_prob", True),
        streams=read.size("hc_count", 4, least=2, most=64),
        rank=read.size("hc_lowrank", 320),
        index_heads=read.size("indexer_n_heads"),
        index_dim=read.size("indexer_head_dim"),
        index_block=block,
        index_most=budget // block,
        ngram_layers=_ngram_layers(text, sizes["full_attention"]),
        ngram_most=read.size("ngram_size", 3, least=2, most=16),
        ngram_heads=read.size("heads_per_ngram", 8, most=64),
        ngram_base=read.size("ngram_vocab_size_base", 20_000_000, least=2, most=_MOST_ROWS),
        ngram_divisor=read.size("make_ngram_vocab_size_divisible_by", 128),
        ngram_seed=read.size("seed", 1234, least=0, most=2**63 - 1),
        ngram_separator=_separator(text),
        ngram_size=read.size("ple_embed_dim", sizes["hidden_size"]),
        ngram_taps=read.size("ple_conv_kernel_size", 4, most=64),
    )
    refuse_impossible(config)
    hashes = (config.ngram_most - 1) * config.ngram_heads
    refuse_unequal_division(config.ngram_size, hashes, "ple_embed_dim by the number of hashes")
    if config.rope.dim > config.index_dim:
        raise CheckpointError(
            f"config.json: indexer_head_dim is {config.index_dim}, less than {config.rope.dim} rotary dimensions",
            code="invalid_config",
        )
    return config


def _ngram_layers(text: Mapping[str, Any], full_attention: tuple[bool, ...]) -> tuple[int, ...]:
    """Read the layers with embeddings of n-grams, which configs count from 1."""
    listed = text.get("ple_layer_ids") or []
    last = len(full_attention)
    if not isinstance(listed, list) or any(type(layer) is not int or not 1 <= layer <= last for layer in listed):
        raise CheckpointError(
            f"config.json: ple_layer_ids is {shown(listed)}; it must list layers from 1 to {last}",
            code="invalid_config",
        )
    layers = tuple(sorted({layer - 1 for layer in listed}))
    if any(full_attention[layer] for layer in layers):
        raise CheckpointError(
            "config.json: ple_layer_ids lists a layer of full attention; only layers of linear attention may have "
            "embeddings of n-grams",
            code="invalid_config",
        )
    return layers


def _separator(text: Mapping[str, Any]) -> int:
    """Read the token that no n-gram crosses: the first end token of the text model."""
    tokens = text.get("eos_token_id")
    first = tokens[0] if isinstance(tokens, list) and tokens else tokens
    if first is None and not text.get("ple_layer_ids"):
        return 0
    if type(first) is not int or not 0 <= first < 2**31:
        raise CheckpointError(
            f"config.json: eos_token_id is {shown(tokens)}; embeddings of n-grams need a token", code="invalid_config"
        )
    return first


def _write_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    layers = sizes.get("ngram_layers", (1,) if sizes["num_layers"] > 1 else ())
    return {
        **write_sizes("qwen4_exp_text", sizes),
        "eos_token_id": sizes.get("ngram_separator", 0),
        "norm_topk_prob": sizes.get("renormalized", True),
        "output_gate_type": "sigmoid" if sizes.get("sigmoid_gate", True) else "silu",
        "hc_count": sizes.get("streams", 4),
        "hc_lowrank": sizes.get("rank") or max(64, sizes["hidden_size"] // 8),
        "indexer_n_heads": sizes.get("index_heads", 4),
        "indexer_kv_heads": 1,
        "indexer_head_dim": sizes.get("index_dim") or max(64, sizes["head_dim"] // 2),
        "indexer_budget": sizes.get("index_most", 512) * sizes.get("index_block", 4),
        "indexer_compress_ratio": sizes.get("index_block", 4),
        "ple_layer_ids": [layer + 1 for layer in layers],
        "ple_embed_dim": sizes.get("ngram_size") or -(-sizes["hidden_size"] // 512) * 512,
        "ple_conv_kernel_size": sizes.get("ngram_taps", 4),
        "ngram_size": sizes.get("ngram_most", 3),
        "heads_per_ngram": sizes.get("ngram_heads", 8),
        "ngram_vocab_size_base": sizes.get("ngram_base", 2**12),
        "make_ngram_vocab_size_divisible_by": sizes.get("ngram_divisor", 128),
        "seed": sizes.get("ngram_seed", 1234),
    }


_FLASH_NEXT = _write_config({
    "vocab_size": 248320,
    "hidden_size": 2560,
    "num_layers": 48,
    "num_heads": 24,
    "num_kv_heads": 2,
    "head_dim": 256,
    "linear_key_heads": 16,
    "linear_value_heads": 48,
    "linear_key_dim": 128,
    "linear_value_dim": 128,
    "num_experts": 512,
    "experts_per_token": 10,
    "expert_size": 640,
    "shared_expert_size": 640,
    "max_context": 262144,
    "ngram_base": 20_000_000,
    "ngram_separator": 248044,
})  # fmt: skip

FAMILY = Family(
    model_types=("qwen4_exp", "qwen4_exp_text"),
    series=("Qwen3.8-Flash-Next",),
    example="Qwen3.8-Flash-Next",
    config=HyperConfig,
    parse_config=_parse_config,
    write_config=_write_config,
    build=build_hyper_model,
    tensor_names=TensorNames(
        prefixes=(
            ("language_model.model.", "model."),
            ("model.language_model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("language_model.mtp.", "mtp."),
        ),
        skipped=re.compile(r"^(model\.|language_model\.)?(visual|vision_tower)\.|\.rotary_emb\.inv_freq$"),
        # The prediction of further tokens, and the hashes, which follow from the config.
        kept=re.compile(r"^mtp\.|\.ple_embedding\.(layer_multipliers|ngram_heads_(offsets|vocab_sizes))$"),
    ),
    tool_format="qwen_xml",
    # Source: the model card on the Hugging Face hub, and configs of its conversions.
    published={"Qwen/Qwen3.8-Flash-Next": _FLASH_NEXT},
)
