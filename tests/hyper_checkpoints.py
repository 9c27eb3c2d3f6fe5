"""Sizes of tiny models with hyper-connections (Qwen3.8-Flash-Next), and their tensors; see ``tiny_checkpoints``."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tiny_checkpoints import Dtype, Geometry, Layout

Specification = tuple[str, tuple[int, ...], float, float]


@dataclass(frozen=True, kw_only=True)
class HyperGeometry(Geometry):
    """The sizes of a model with residual streams, an indexer and embeddings of n-grams."""

    family: Literal["qwen4_exp"] = "qwen4_exp"
    sigmoid_gate: bool = True
    streams: int = 4
    rank: int = 32
    index_heads: int = 8
    index_dim: int = 32
    index_block: int = 4
    index_budget: int = 24
    ngram_layers: tuple[int, ...] = (2,)
    """Layers with embeddings of n-grams, counted from 1."""
    ngram_most: int = 3
    ngram_heads: int = 4
    ngram_base: int = 61
    ngram_divisor: int = 64
    ngram_size: int = 256
    """Elements of the embeddings of a token."""
    ngram_taps: int = 4
    separator: int = 3
    parts: int = 4
    """Tensors among which checkpoints divide a table."""

    def text_config(self) -> dict[str, Any]:
        config = super().text_config()
        config.pop("attn_output_gate")
        return config | {
            "model_type": "qwen4_exp_text",
            "eos_token_id": self.separator,
            "output_gate_type": "sigmoid" if self.sigmoid_gate else "silu",
            "norm_topk_prob": self.renormalized,
            "hc_count": self.streams,
            "hc_lowrank": self.rank,
            "indexer_n_heads": self.index_heads,
            "indexer_kv_heads": 1,
            "indexer_head_dim": self.index_dim,
            "indexer_budget": self.index_budget,
            "indexer_compress_ratio": self.index_block,
            "ple_layer_ids": list(self.ngram_layers),
            "ple_embed_dim": self.ngram_size,
            "ple_conv_kernel_size": self.ngram_taps,
            "ngram_size": self.ngram_most,
            "heads_per_ngram": self.ngram_heads,
            "ngram_vocab_size_base": self.ngram_base,
            "make_ngram_vocab_size_divisible_by": self.ngram_divisor,
            "split_ngram_parts": self.parts,
            "mtp_num_hidden_layers": 1,
        }

    def config(self, layout: Layout = "fused", dtype: Dtype = "F32") -> dict[str, Any]:
        config = super().config(layout, dtype)
        kind = "ForConditionalGeneration" if "text_config" in config else "ForCausalLM"
        own = "qwen4_exp" if "text_config" in config else "qwen4_exp_text"
        return config | {"architectures": [f"Qwen4Exp{kind}"], "model_type": own}

    @property
    def mlx_prefix(self) -> str:
        return "language_model."

    @property
    def table_rows(self) -> dict[int, int]:
        """The rows of the table of each layer, which is counted from 0."""
        hashes = (self.ngram_most - 1) * self.ngram_heads
        primes = [number for number in range(self.ngram_base, 20 * self.ngram_base) if _is_prime(number)]
        rows = {}
        for index, layer in enumerate(self.ngram_layers):
            own = sum(primes[index * hashes : (index + 1) * hashes])
            rows[layer - 1] = -(-own // self.ngram_divisor) * self.ngram_divisor
        return rows

    def specification(self, layer: int) -> Iterator[Specification]:
        """Yield the tensors of ``layer`` beside its mixer and its experts; see ``tiny_checkpoints``."""
        prefix, wide = f"layers.{layer}.", self.streams * self.hidden_size
        for name in ("attn_hyper_connection.", "mlp_hyper_connection."):
            yield from self.connection(prefix + name)
        if self.layer_types[layer] == "F":
            own = f"{prefix}self_attn.indexer."
            yield _linear(f"{own}index_qk_proj.weight", (self.index_heads + 1) * self.index_dim, self.hidden_size)
            yield f"{own}q_layernorm.weight", (self.index_dim,), 0.5, 0.5
            yield f"{own}k_layernorm.weight", (self.index_dim,), 0.5, 0.5
        if layer + 1 in self.ngram_layers:
            own, hashes = f"{prefix}ple.", (self.ngram_most - 1) * self.ngram_heads
            table = self.table_rows[layer], self.ngram_size // hashes
            yield f"{own}ple_embedding.ngram_embedding.weight", table, 0.0, math.sqrt(3)
            yield _linear(f"{own}key_proj.weight", wide, self.ngram_size)
            yield _linear(f"{own}value_proj.weight", self.hidden_size, self.ngram_size)
            for name in ("norm_key", "norm_query", "norm_conv"):
                yield f"{own}{name}.weight", (wide,), 0.0, 0.4
            yield f"{own}conv1d.weight", (wide, 1, self.ngram_taps), 0.0, math.sqrt(3 / self.ngram_taps)

    def connection(self, prefix: str, injects: bool = True) -> Iterator[Specification]:
        """Yield the tensors of a connection to the residual streams."""
        wide = self.streams * self.hidden_size
        yield f"{prefix}hc_norm.weight", (wide,), 0.0, 0.4
        yield _linear(f"{prefix}input_mix_weight_down.weight", self.rank, wide, self.streams)
        yield _linear(f"{prefix}input_mix_weight_up.weight", wide, self.rank, 2.0)
        if injects:
            yield _linear(f"{prefix}block_inject_weight.weight", self.streams, wide, self.streams)

    def published(self, name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the tensors that checkpoints have in place of a tensor."""
        if name.endswith("ngram_embedding.weight"):
            for part, rows in enumerate(np.split(values, self.parts)):
                yield name.replace("embedding.weight", f"embedding.shard_{part}.weight"), rows
        else:
            yield name, values


def _linear(name: str, out: int, into: int, gain: float = 1.0) -> Specification:
    return name, (out, into), 0.0, gain * math.sqrt(3 / into)


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


_SPARSE = HyperGeometry(
    name="hyper",
    layer_types="LLLF",
    hidden_size=64,
    vocab_size=97,
    heads=4,
    kv_heads=2,
    head_dim=32,
    rotary_fraction=0.5,
    key_heads=2,
    value_heads=4,
    key_dim=32,
    value_dim=32,
    experts=16,
    top_k=4,
    expert_size=32,
    shared_expert_size=32,
    group_size=32,
)
HYPER_GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        _SPARSE,
        # All tokens of the recordings fit into the budget of the indexer.
        HyperGeometry(**{**vars(_SPARSE), "name": "hyper-dense", "index_budget": 256, "nested": False}),
        # Three streams, two tables, blocks of three tokens, and a tied head.
        HyperGeometry(
            name="hyper-tables",
            layer_types="LFLF",
            layers_told_by="interval",
            hidden_size=96,
            vocab_size=113,
            heads=3,
            kv_heads=1,
            head_dim=64,
            rotary_fraction=0.25,
            key_heads=1,
            value_heads=3,
            key_dim=32,
            value_dim=64,
            experts=12,
            top_k=5,
            expert_size=64,
            shared_expert_size=96,
            group_size=32,
            conv_kernel=3,
            rms_norm_eps=1e-4,
            rope_theta=10_000.0,
            tied=True,
            attention_bias=True,
            renormalized=False,
            sigmoid_gate=False,
            streams=3,
            rank=48,
            index_dim=16,
            index_block=3,
            index_budget=30,
            ngram_layers=(1, 3),
            ngram_most=4,
            ngram_heads=2,
            ngram_base=40,
            ngram_divisor=6,
            ngram_size=192,
            ngram_taps=2,
            separator=7,
            parts=2,
        ),
    )
}
