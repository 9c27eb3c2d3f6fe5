"""Tiny checkpoints of the native families with the structure of the published checkpoints, made from a seed.

Every tensor is a pure function of (geometry, seed, name). It uses raw PCG64 words, whose stream numpy guarantees, and
float operations that round identically on all platforms. Recorded logits therefore stay valid; ``weights_hash`` detects
changes of the weights.

Canonical names are those of the transformers text model, without prefix: ``layers.0.mlp.experts.gate_up_proj``.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

Layout = Literal["fused", "per_expert", "mlx4"]
FamilyName = Literal["qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen4_exp"]
Dtype = Literal["F32", "BF16"]
Tensors = dict[str, np.ndarray]
"""Arrays by name; uint16 arrays hold the bits of bfloat16, which numpy does not have."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model, and the form of its config.json."""

    name: str
    layer_types: str
    """One letter per layer: L for linear attention (GatedDeltaNet), F for full attention."""

    hidden_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_fraction: float
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    experts: int
    top_k: int
    expert_size: int
    shared_expert_size: int
    group_size: int
    conv_kernel: int = 4
    rope_theta: float = 10_000_000.0
    rms_norm_eps: float = 1e-6
    tied: bool = False
    attention_bias: bool = False
    nested: bool = True
    """Whether the config is ``qwen3_5_moe`` with a ``text_config``, or the flat ``qwen3_5_moe_text``."""

    layers_told_by: Literal["layer_types", "interval", "default"] = "layer_types"
    flat_rope: bool = False
    """Whether rotary settings are beside the sizes, as before transformers 5, instead of in ``rope_parameters``."""
    scaling: tuple[tuple[str, Any], ...] = ()
    """Further entries of ``rope_parameters``."""

    context: int = 4096
    """Tokens of the context. The weights do not depend on it."""
    family: FamilyName = "qwen3_5_moe"
    mlp_layers: tuple[int, ...] = ()
    """Layers with an MLP of the inner width ``mlp_size`` in place of experts."""
    mlp_size: int = 0
    renormalized: bool = True
    """Whether the weights of a token's experts sum to 1."""

    @property
    def gated(self) -> bool:
        return self.family != "qwen3_moe"

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.num_layers) if layer not in self.mlp_layers]

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def key_width(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def conv_width(self) -> int:
        return 2 * self.key_width + self.value_width

    def text_config(self) -> dict[str, Any]:
        """Return the part of ``config.json`` for the text model."""
        config: dict[str, Any] = {
            "model_type": "qwen3_5_moe_text",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "attn_output_gate": True,
            "linear_conv_kernel_dim": self.conv_kernel,
            "linear_key_head_dim": self.key_dim,
            "linear_value_head_dim": self.value_dim,
            "linear_num_key_heads": self.key_heads,
            "linear_num_value_heads": self.value_heads,
            "mamba_ssm_dtype": "float32",
            "moe_intermediate_size": self.expert_size,
            "shared_expert_intermediate_size": self.shared_expert_size,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
        }
        if self.family in ("qwen3_moe", "qwen3_next"):
            return self._older_config(config)
        rope = {"rope_theta": self.rope_theta, "partial_rotary_factor": self.rotary_fraction}
        if self.flat_rope:
            config |= rope
        else:
            section = {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
            config["rope_parameters"] = {"rope_type": "default", **rope, **section, **dict(self.scaling)}
        if self.layers_told_by == "layer_types":
            kinds = {"L": "linear_attention", "F": "full_attention"}
            config["layer_types"] = [kinds[letter] for letter in self.layer_types]
        elif self.layers_told_by == "interval":
            config["full_attention_interval"] = self.layer_types.index("F") + 1
        return config

    def _older_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return ``config`` as models published before Qwen3.5 have it: flat, with rotary settings beside the sizes."""
        only_hybrid = ("linear_", "attn_output_gate", "mamba_", "shared_expert", "layer_types")
        kept = {name: value for name, value in config.items() if self.gated or not name.startswith(only_hybrid)}
        kept.pop("attn_output_gate", None)
        kept |= {
            "model_type": self.family,
            "norm_topk_prob": self.renormalized,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(self.mlp_layers),
            "intermediate_size": self.mlp_size or 8 * self.expert_size,
            "rope_theta": self.rope_theta,
            "rope_scaling": dict(self.scaling) or None,
        }
        if self.gated:
            kept["partial_rotary_factor"] = self.rotary_fraction
            kinds = {"L": "linear_attention", "F": "full_attention"}
            kept["layer_types"] = [kinds[letter] for letter in self.layer_types]
        else:
            kept |= {"sliding_window": None, "max_window_layers": self.num_layers, "use_sliding_window": False}
        return kept

    def config(self, layout: Layout = "fused", dtype: Dtype = "F32") -> dict[str, Any]:
        """Return the whole ``config.json`` of a checkpoint."""
        text = self.text_config()
        text["dtype"] = {"F32": "float32", "BF16": "bfloat16"}[dtype]
        if self.family in ("qwen3_moe", "qwen3_next"):
            config = {"architectures": [{"qwen3_moe": "Qwen3MoeForCausalLM"}.get(self.family, "Qwen3NextForCausalLM")]}
            return config | text | (self._quantization() if layout == "mlx4" else {})
        if not self.nested and layout != "mlx4":
            return {"architectures": ["Qwen3_5MoeForCausalLM"], **text}
        config = {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "tie_word_embeddings": self.tied,
            "image_token_id": 1,
            "video_token_id": 2,
            "text_config": text,
        }
        return config | (self._quantization() if layout == "mlx4" else {})

    def _quantization(self) -> dict[str, Any]:
        quantization: dict[str, Any] = {"group_size": self.group_size, "bits": 4, "mode": "affine"}
        for layer in self.moe_layers:
            for gate in ("gate", "shared_expert_gate") if self.gated else ("gate",):
                quantization[f"{self.mlx_prefix}model.layers.{layer}.mlp.{gate}"] = {"group_size": 64, "bits": 8}
        return {"quantization": quantization, "quantization_config": quantization}

    def specification(self, layer: int) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
        """Yield name, shape, center and half width of the tensors of ``layer`` beside its mixer and its experts."""
        norms = 0.0 if self.gated else 1.0
        yield f"layers.{layer}.input_layernorm.weight", (self.hidden_size,), norms, 0.4
        yield f"layers.{layer}.post_attention_layernorm.weight", (self.hidden_size,), norms, 0.4

    def connection(self, prefix: str, injects: bool) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
        """Yield the tensors behind the last layer."""
        yield "norm.weight", (self.hidden_size,), 0.0 if self.gated else 1.0, 0.4

    def published(self, name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the tensors that checkpoints have in place of a tensor."""
        yield name, values

    @property
    def mlx_prefix(self) -> str:
        """The prefix of all names in an MLX conversion."""
        return "language_model." if self.family == "qwen3_5_moe" else ""


GEOMETRIES: Mapping[str, Geometry] = {
    geometry.name: geometry
    for geometry in (
        # The proportions of the published models, which mlx-lm also runs.
        Geometry(
            name="plain",
            layer_types="LLLF",
            layers_told_by="default",
            hidden_size=128,
            vocab_size=256,
            heads=4,
            kv_heads=2,
            head_dim=32,
            rotary_fraction=0.25,
            key_heads=2,
            value_heads=4,
            key_dim=32,
            value_dim=32,
            experts=16,
            top_k=4,
            expert_size=64,
            shared_expert_size=64,
            group_size=64,
        ),
        # The inner size of the shared expert is smaller than a group, so a quantized checkpoint keeps one tensor dense.
        Geometry(
            name="tied",
            layer_types="LFLF",
            layers_told_by="interval",
            hidden_size=64,
            vocab_size=211,
            heads=4,
            kv_heads=1,
            head_dim=64,
            rotary_fraction=0.25,
            key_heads=2,
            value_heads=2,
            key_dim=64,
            value_dim=32,
            experts=8,
            top_k=2,
            expert_size=64,
            shared_expert_size=32,
            group_size=64,
            rope_theta=10_000.0,
            tied=True,
        ),
        Geometry(
            name="pattern",
            layer_types="FLLFL",
            hidden_size=192,
            vocab_size=160,
            heads=6,
            kv_heads=3,
            head_dim=32,
            rotary_fraction=0.5,
            key_heads=3,
            value_heads=6,
            key_dim=32,
            value_dim=64,
            experts=24,
            top_k=6,
            expert_size=32,
            shared_expert_size=96,
            group_size=32,
            conv_kernel=3,
            rms_norm_eps=1e-2,
            attention_bias=True,
        ),
        Geometry(
            name="text",
            layer_types="LLLFLL",
            hidden_size=64,
            vocab_size=200,
            heads=8,
            kv_heads=2,
            head_dim=32,
            rotary_fraction=0.5,
            key_heads=1,
            value_heads=4,
            key_dim=32,
            value_dim=32,
            experts=32,
            top_k=3,
            expert_size=32,
            shared_expert_size=64,
            group_size=32,
            rope_theta=1_000_000.0,
            nested=False,
        ),
        Geometry(
            name="wide",
            layer_types="LLFLL",
            layers_told_by="interval",
            hidden_size=128,
            vocab_size=173,
            heads=2,
            kv_heads=2,
            head_dim=64,
            rotary_fraction=0.5,
            key_heads=4,
            value_heads=8,
            key_dim=64,
            value_dim=32,
            experts=12,
            top_k=5,
            expert_size=96,
            shared_expert_size=128,
            group_size=32,
            rope_theta=100_000.0,
            flat_rope=True,
        ),
    )
}

YARN = replace(
    GEOMETRIES["text"],
    name="yarn",
    rope_theta=10_000.0,
    # Of the 8 pairs, two are kept, two are divided by the factor, and the rest are blended.
    scaling=(("rope_type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 4096)),
)
"""A geometry with YaRN, by which published models extend their context."""

_NEXT = replace(
    GEOMETRIES["plain"],
    name="next",
    family="qwen3_next",
    layers_told_by="layer_types",
    nested=False,
    key_heads=2,
    value_heads=4,
)
_CODER = Geometry(
    name="moe",
    family="qwen3_moe",
    layer_types="FFF",
    hidden_size=128,
    vocab_size=256,
    heads=8,
    kv_heads=2,
    head_dim=32,
    rotary_fraction=1.0,
    key_heads=0,
    value_heads=0,
    key_dim=0,
    value_dim=0,
    experts=16,
    top_k=4,
    expert_size=64,
    shared_expert_size=0,
    group_size=64,
    rope_theta=1_000_000.0,
    nested=False,
)
_EXTENDED = (("rope_type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 32))
OLDER_GEOMETRIES: Mapping[str, Geometry] = {
    geometry.name: geometry
    for geometry in (
        _CODER,
        # Some layers without experts, weights that do not sum to 1, biases, and as many kv heads as heads.
        replace(
            _CODER,
            name="moe-mlp",
            layer_types="FFFF",
            hidden_size=64,
            vocab_size=173,
            heads=4,
            kv_heads=4,
            experts=8,
            top_k=3,
            expert_size=32,
            group_size=32,
            rope_theta=10_000.0,
            rms_norm_eps=1e-5,
            tied=True,
            attention_bias=True,
            mlp_layers=(0, 2),
            mlp_size=96,
            renormalized=False,
        ),
        # YaRN in the older spelling, and heads that are wider than hidden_size / heads.
        replace(
            _CODER,
            name="moe-yarn",
            layer_types="FF",
            hidden_size=96,
            vocab_size=160,
            heads=4,
            kv_heads=1,
            head_dim=64,
            experts=24,
            top_k=6,
            expert_size=96,
            group_size=32,
            scaling=(("type", "yarn"), *_EXTENDED[1:]),
        ),
        _NEXT,
        # One value head for each key head, and a layer without experts.
        replace(
            _NEXT,
            name="next-mlp",
            layer_types="LFLL",
            vocab_size=199,
            heads=4,
            kv_heads=1,
            head_dim=64,
            key_heads=3,
            value_heads=3,
            key_dim=32,
            value_dim=64,
            experts=12,
            top_k=5,
            expert_size=96,
            group_size=32,
            tied=True,
            mlp_layers=(1,),
            mlp_size=160,
        ),
        # Three value heads for each key head, YaRN, and weights that do not sum to 1.
        replace(
            _NEXT,
            name="next-yarn",
            layer_types="FLL",
            hidden_size=192,
            vocab_size=160,
            heads=6,
            kv_heads=3,
            rotary_fraction=0.5,
            value_heads=6,
            key_dim=64,
            experts=24,
            top_k=6,
            expert_size=32,
            shared_expert_size=96,
            group_size=32,
            conv_kernel=3,
            scaling=_EXTENDED,
            renormalized=False,
        ),
    )
}
"""Geometries of Qwen3-MoE and Qwen3-Next."""

SEEDS = (0, 1, 2)


def random_words(count: int, *key: object) -> np.ndarray:
    """Return ``count`` random uint64 that depend only on ``key``."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(count)


def dense_weights(geometry: Geometry, seed: int, dtype: Dtype = "F32") -> Tensors:
    """Return float32 weights by canonical name; for "BF16", rounded to bfloat16."""
    weights: Tensors = {}
    for name, shape, center, spread in _specification(geometry):
        words = random_words(math.prod(shape), geometry.name, seed, name)
        uniform = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
        values = (np.float32(center) + np.float32(spread) * uniform).reshape(shape)
        weights[name] = values if dtype == "F32" or _stays_f32(name) else _from_bf16(_to_bf16(values))
    return weights


def dequantized_weights(geometry: Geometry, seed: int, dtype: Dtype = "BF16") -> Tensors:
    """Return the weights of the "mlx4" checkpoint of this seed, dequantized to float32, by canonical name."""
    stored = _mlx4_tensors(geometry, seed, dtype)
    weights: Tensors = {}
    for stored_name in [name for name in stored if not name.endswith((".scales", ".biases"))]:
        values = stored[stored_name]
        if values.dtype == np.uint32:
            bits, _ = _bits_and_group(stored_name, geometry)
            module = stored_name.removesuffix(".weight")
            values = _dequantize(values, *(_as_f32(stored[f"{module}.{part}"]) for part in ("scales", "biases")), bits)
        values = _as_f32(values)
        name = stored_name.removeprefix(geometry.mlx_prefix).removeprefix("model.")
        if name.endswith("conv1d.weight"):
            values = values.swapaxes(1, 2)
        elif _is_centered_norm(geometry, name):
            values = values - np.float32(1)
        weights[name] = np.ascontiguousarray(values)
    for name in [name for name in weights if name.endswith(".shard_0.weight")]:
        table = name.removesuffix(".shard_0.weight")
        parts = [
            weights.pop(f"{table}.shard_{part}.weight")
            for part in range(len(weights))
            if f"{table}.shard_{part}.weight" in weights
        ]
        weights[f"{table}.weight"] = np.concatenate(parts)
    for layer in geometry.moe_layers:
        experts, stacked = f"layers.{layer}.mlp.experts", f"layers.{layer}.mlp.switch_mlp"
        gate, up = (weights.pop(f"{stacked}.{part}_proj.weight") for part in ("gate", "up"))
        weights[f"{experts}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        weights[f"{experts}.down_proj"] = weights.pop(f"{stacked}.down_proj.weight")
    return weights


def weights_hash(weights: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of names, shapes and bytes, independent of the order of the tensors."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def write_checkpoint(
    folder: Path,
    geometry: Geometry,
    seed: int,
    layout: Layout = "fused",
    *,
    dtype: Dtype | None = None,
    shards: int = 1,
    extras: bool = False,
) -> Path:
    """Write config.json and the weights into ``folder``, and return the folder.

    Args:
        folder: directory of the checkpoint.
        geometry: sizes of the model.
        seed: seed of the weights.
        layout: "fused" (loaded by transformers), "per_expert" (saved by transformers by default) or "mlx4" (written by
            ``mlx_lm.convert -q --q-bits 4``).
        dtype: type of the tensors, or of the scales of quantized tensors. None for F32, or BF16 for "mlx4".
        shards: number of safetensors files.
        extras: whether to add vision and MTP tensors, which a text engine skips.
    """
    dtype = dtype or ("BF16" if layout == "mlx4" else "F32")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(geometry.config(layout, dtype), indent=2))
    if layout == "mlx4":
        tensors = _mlx4_tensors(geometry, seed, dtype)
    else:
        tensors = _published_tensors(geometry, seed, layout, dtype)
    if extras:
        tensors |= _extras(geometry, layout)
    _write_shards(folder, tensors, shards, "mlx" if layout == "mlx4" else "pt")
    return folder


def _specification(geometry: Geometry) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Yield name, shape, center and half width of every tensor; values are distributed uniformly.

    The widths are chosen so that every part affects the logits: each layer makes a considerable change to the residual
    stream, attention and routing are neither uniform nor one-hot, and decays range from a few tokens to hundreds.
    """
    g = geometry

    def linear(name: str, out: int, into: int, gain: float = 1.0) -> tuple[str, tuple[int, ...], float, float]:
        return name, (out, into), 0.0, gain * math.sqrt(3 / into)

    embedding_gain = 1 / math.sqrt(g.hidden_size) if g.tied else 1.0
    yield "embed_tokens.weight", (g.vocab_size, g.hidden_size), 0.0, embedding_gain * math.sqrt(3)
    for layer, kind in enumerate(g.layer_types):
        prefix = f"layers.{layer}"
        norms = 0.0 if g.gated else 1.0
        yield from g.specification(layer)
        if kind == "L":
            mixer = f"{prefix}.linear_attn"
            yield f"{mixer}.A_log", (g.value_heads,), -2.0, 3.0
            yield f"{mixer}.dt_bias", (g.value_heads,), -0.5, 1.5
            yield f"{mixer}.conv1d.weight", (g.conv_width, 1, g.conv_kernel), 0.0, math.sqrt(3 / g.conv_kernel)
            yield f"{mixer}.norm.weight", (g.value_dim,), 1.0, 0.4
            if g.family == "qwen3_next":
                yield linear(f"{mixer}.in_proj_qkvz.weight", g.conv_width + g.value_width, g.hidden_size)
                yield linear(f"{mixer}.in_proj_ba.weight", 2 * g.value_heads, g.hidden_size)
            else:
                yield linear(f"{mixer}.in_proj_qkv.weight", g.conv_width, g.hidden_size)
                yield linear(f"{mixer}.in_proj_z.weight", g.value_width, g.hidden_size)
                yield linear(f"{mixer}.in_proj_a.weight", g.value_heads, g.hidden_size)
                yield linear(f"{mixer}.in_proj_b.weight", g.value_heads, g.hidden_size)
            yield linear(f"{mixer}.out_proj.weight", g.hidden_size, g.value_width)
        else:
            mixer = f"{prefix}.self_attn"
            width = g.heads * g.head_dim
            sizes = {
                "q": (1 + g.gated) * width,
                "k": g.kv_heads * g.head_dim,
                "v": g.kv_heads * g.head_dim,
                "o": g.hidden_size,
            }
            for part, size in sizes.items():
                inputs, gain = (width, 2.0) if part == "o" else (g.hidden_size, 1.0)
                yield linear(f"{mixer}.{part}_proj.weight", size, inputs, gain)
                if g.attention_bias:
                    yield f"{mixer}.{part}_proj.bias", (size,), 0.0, 0.3
            yield f"{mixer}.q_norm.weight", (g.head_dim,), 0.5 + norms, 0.5
            yield f"{mixer}.k_norm.weight", (g.head_dim,), 0.5 + norms, 0.5
        mlp = f"{prefix}.mlp"
        if layer in g.mlp_layers:
            yield linear(f"{mlp}.gate_proj.weight", g.mlp_size, g.hidden_size)
            yield linear(f"{mlp}.up_proj.weight", g.mlp_size, g.hidden_size)
            yield linear(f"{mlp}.down_proj.weight", g.hidden_size, g.mlp_size)
            continue
        yield linear(f"{mlp}.gate.weight", g.experts, g.hidden_size, 2.0)
        experts_in, experts_out = (2 * g.expert_size, g.hidden_size), (g.hidden_size, g.expert_size)
        yield f"{mlp}.experts.gate_up_proj", (g.experts, *experts_in), 0.0, math.sqrt(3 / g.hidden_size)
        yield f"{mlp}.experts.down_proj", (g.experts, *experts_out), 0.0, 2 * math.sqrt(3 / g.expert_size)
        if not g.shared_expert_size:
            continue
        yield linear(f"{mlp}.shared_expert.gate_proj.weight", g.shared_expert_size, g.hidden_size)
        yield linear(f"{mlp}.shared_expert.up_proj.weight", g.shared_expert_size, g.hidden_size)
        yield linear(f"{mlp}.shared_expert.down_proj.weight", g.hidden_size, g.shared_expert_size)
        yield linear(f"{mlp}.shared_expert_gate.weight", 1, g.hidden_size)
    yield from g.connection("hyper_connection_mixer.", False)
    if not g.tied:
        yield linear("lm_head.weight", g.vocab_size, g.hidden_size)


def _stays_f32(name: str) -> bool:
    """Tell whether a tensor is one of the two that published bfloat16 checkpoints keep in float32."""
    return name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))


def _is_centered_norm(geometry: Geometry, name: str) -> bool:
    """Tell whether a tensor is of a norm that scales by 1 + weight; MLX checkpoints contain the sum."""
    if geometry.family in ("qwen3_moe", "qwen4_exp"):
        return False
    return name.endswith(("layernorm.weight", "q_norm.weight", "k_norm.weight")) or name == "norm.weight"


def _published_tensors(geometry: Geometry, seed: int, layout: Layout, dtype: Dtype) -> Tensors:
    prefix = "model.language_model." if geometry.nested else "model."
    tensors: Tensors = {}
    for name, values in dense_weights(geometry, seed, dtype).items():
        whole = values if dtype == "F32" or _stays_f32(name) else _to_bf16(values)
        if layout == "per_expert" and ".experts." in name:
            tensors |= _expert_by_expert(prefix + name, whole)
            continue
        for part, stored in geometry.published(name, whole):
            tensors[part if part.startswith("lm_head") else prefix + part] = stored
    return tensors


def _expert_by_expert(name: str, stacked: np.ndarray) -> Tensors:
    module, projection = name.rsplit(".", 1)
    tensors: Tensors = {}
    for expert, values in enumerate(stacked):
        parts = {"down_proj": values}
        if projection == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), np.split(values, 2), strict=True))
        for part, array in parts.items():
            tensors[f"{module}.{expert}.{part}.weight"] = array
    return tensors


def _mlx4_tensors(geometry: Geometry, seed: int, dtype: Dtype) -> Tensors:
    tensors: Tensors = {}
    for name, values in dense_weights(geometry, seed, dtype).items():
        for mlx_name, array in _named_as_mlx(geometry, name, values):
            bits, group_size = _bits_and_group(mlx_name, geometry)
            if array.ndim < 2 or mlx_name.endswith("conv1d.weight") or array.shape[-1] % group_size:
                tensors[mlx_name] = array if dtype == "F32" or name.endswith("A_log") else _to_bf16(array)
                continue
            module = mlx_name.removesuffix(".weight")
            parts = _quantize(array, bits, group_size, dtype)
            tensors |= {f"{module}.{part}": stored for part, stored in parts.items()}
    return tensors


def _named_as_mlx(geometry: Geometry, name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    if name.startswith("lm_head"):
        yield geometry.mlx_prefix + name, values
        return
    mlx_name = f"{geometry.mlx_prefix}model.{name}"
    if name.endswith("experts.gate_up_proj"):
        for part, array in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
            yield mlx_name.replace("experts.gate_up_proj", f"switch_mlp.{part}_proj.weight"), array
    elif name.endswith("experts.down_proj"):
        yield mlx_name.replace("experts.down_proj", "switch_mlp.down_proj.weight"), values
    elif name.endswith("conv1d.weight"):
        yield mlx_name, np.ascontiguousarray(values.swapaxes(1, 2))
    elif _is_centered_norm(geometry, name):
        yield mlx_name, values + np.float32(1)
    else:
        yield from geometry.published(mlx_name, values)


def _bits_and_group(mlx_name: str, geometry: Geometry) -> tuple[int, int]:
    """Return bits and group size according to mlx-lm's predicate for this family: 8 bits for the two gates."""
    return (8, 64) if re.search(r"\.mlp\.(shared_expert_)?gate\.", mlx_name) else (4, geometry.group_size)


def _quantize(values: np.ndarray, bits: int, group_size: int, dtype: Dtype) -> Tensors:
    """Quantize like MLX (affine): the end of the range further from zero is exact, and scales have a sign."""
    groups = values.reshape(*values.shape[:-1], -1, group_size)
    low, high = groups.min(-1), groups.max(-1)
    steps = np.float32(2**bits - 1)
    from_low = np.abs(low) > np.abs(high)
    scales = np.maximum((high - low) / steps, np.float32(1e-7))
    scales = np.where(from_low, scales, -scales)
    biases = np.where(from_low, low, high)
    zero_code = np.rint(biases / scales)
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.where(zero_code != 0, biases / zero_code, scales)
    biases = np.where(zero_code != 0, biases, np.float32(0))
    if dtype == "BF16":
        stored_scales, stored_biases = _to_bf16(scales), _to_bf16(biases)
        scales, biases = _from_bf16(stored_scales), _from_bf16(stored_biases)
    else:
        stored_scales, stored_biases = scales, biases
    codes = np.clip(np.rint((groups - biases[..., None]) / scales[..., None]), 0, steps).astype(np.uint32)
    per_word = 32 // bits
    words = codes.reshape(*values.shape[:-1], -1, per_word) << (np.arange(per_word, dtype=np.uint32) * bits)
    return {
        "weight": np.bitwise_or.reduce(words, axis=-1).astype(np.uint32),
        "scales": stored_scales,
        "biases": stored_biases,
    }


def _dequantize(words: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    shifts = np.arange(32 // bits, dtype=np.uint32) * bits
    codes = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
    groups = codes.reshape(*scales.shape, -1).astype(np.float32)
    values = scales[..., None] * groups + biases[..., None]
    return values.reshape(*words.shape[:-1], -1)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """Return the upper half of the float32 bits, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _as_f32(stored: np.ndarray) -> np.ndarray:
    return _from_bf16(stored) if stored.dtype == np.uint16 else stored


def _extras(geometry: Geometry, layout: Layout) -> Tensors:
    """Return vision and MTP tensors, which are published with the text model and must never be read."""
    nan = np.float32(np.nan)
    names = [
        "model.visual.patch_embed.proj.weight",
        "model.visual.blocks.0.mlp.linear_fc1.weight",
        "mtp.fc.weight",
        "mtp.norm.weight",
        "mtp.layers.0.input_layernorm.weight",
        "mtp.layers.0.self_attn.q_proj.weight",
        "mtp.layers.0.mlp.experts.gate_up_proj",
        "mtp.layers.0.mlp.experts.0.gate_proj.weight",
    ]
    if layout == "mlx4":
        names = [re.sub(r"^model\.visual", "vision_tower", re.sub(r"^mtp", "language_model.mtp", n)) for n in names]
    return {name: np.full((8, geometry.hidden_size), nan) for name in names}


def _write_shards(folder: Path, tensors: Tensors, shards: int, made_by: str) -> None:
    if shards == 1:
        _write_safetensors(folder / "model.safetensors", tensors, made_by)
        return
    # Distribute tensors round-robin, so that tensors of a layer, and of an expert, are in different files.
    names = [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]
    weight_map = {tensor: names[index % shards] for index, tensor in enumerate(tensors)}
    for file_name in names:
        part = {tensor: values for tensor, values in tensors.items() if weight_map[tensor] == file_name}
        _write_safetensors(folder / file_name, part, made_by)
    total = sum(values.nbytes for values in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


_STORED_DTYPES = {"float32": "F32", "uint16": "BF16", "uint32": "U32"}


def _write_safetensors(path: Path, tensors: Tensors, made_by: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": made_by}}
    offset = 0
    for name, values in tensors.items():
        end = offset + values.nbytes
        dtype = _STORED_DTYPES[values.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # transformers pads headers to 8 bytes; MLX does not, so the data of many published files is not aligned.
    text += b" " * ((len(text) % 2 == 0) if made_by == "mlx" else -len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in tensors.values():
            file.write(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
