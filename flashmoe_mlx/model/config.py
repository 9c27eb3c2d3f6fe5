"""The geometry of a Qwen3.5-MoE model, read from the ``config.json`` that it was published with.

Field names and defaults: ``transformers`` ``Qwen3_5MoeTextConfig``. A config is untrusted input: every number is
checked here, once, and everything else in the package may rely on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe_mlx.errors import CheckpointError

SUPPORTED_MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
_LARGEST = 2**24
"""No size in a config may exceed this; products of any three then fit a 128-bit integer, and a typo fails here."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of a model; all in elements, heads, layers or experts."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    full_attention: tuple[bool, ...]
    """Per layer: True for full attention, False for GatedDeltaNet."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_dim: int
    rope_theta: float
    attention_bias: bool

    linear_key_heads: int
    linear_value_heads: int
    linear_key_dim: int
    linear_value_dim: int
    linear_conv_kernel: int

    num_experts: int
    experts_per_token: int
    expert_size: int
    shared_expert_size: int

    @property
    def key_width(self) -> int:
        """Channels of the keys, and of the queries, of a GatedDeltaNet layer."""
        return self.linear_key_heads * self.linear_key_dim

    @property
    def value_width(self) -> int:
        """Channels of the values of a GatedDeltaNet layer."""
        return self.linear_value_heads * self.linear_value_dim

    @property
    def conv_width(self) -> int:
        """Channels that go through the short convolution: queries, keys and values."""
        return 2 * self.key_width + self.value_width

    @classmethod
    def from_json(cls, published: Mapping[str, Any]) -> "ModelConfig":
        """Read a ``config.json``; the text part is taken from ``text_config`` where there is one.

        Raises:
            CheckpointError: the model is of another kind, or a value is missing, mistyped or out of range.
        """
        model_type = published.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise CheckpointError(
                f"config.json: model_type {model_type!r} is not supported; use {', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        text = published.get("text_config", published)
        if not isinstance(text, Mapping):
            raise CheckpointError("config.json: text_config is not an object")
        read = _Reader(text)
        if text.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"config.json: hidden_act {text['hidden_act']!r} is not supported; it must be silu")

        num_layers = read.size("num_hidden_layers")
        head_dim = read.size("head_dim", 256)
        rope = _Reader(_rope_parameters(text))
        rope_dim = int(head_dim * rope.number("partial_rotary_factor", 0.25, most=1.0))
        if rope_dim < 2 or rope_dim % 2:
            raise CheckpointError(
                f"config.json: {rope_dim} rotary dimensions of {head_dim}; they must be even, 2 or more"
            )
        config = cls(
            num_layers=num_layers,
            hidden_size=read.size("hidden_size"),
            vocab_size=read.size("vocab_size"),
            max_context=read.size("max_position_embeddings", 32768),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6, most=1.0),
            tie_word_embeddings=_tied(published, text),
            full_attention=_full_attention(text, num_layers, read),
            num_heads=read.size("num_attention_heads"),
            num_kv_heads=read.size("num_key_value_heads"),
            head_dim=head_dim,
            rope_dim=rope_dim,
            rope_theta=rope.number("rope_theta", None, most=1e12),
            attention_bias=read.flag("attention_bias", False),
            linear_key_heads=read.size("linear_num_key_heads"),
            linear_value_heads=read.size("linear_num_value_heads"),
            linear_key_dim=read.size("linear_key_head_dim"),
            linear_value_dim=read.size("linear_value_head_dim"),
            linear_conv_kernel=read.size("linear_conv_kernel_dim", 4, least=2),
            num_experts=read.size("num_experts"),
            experts_per_token=read.size("num_experts_per_tok"),
            expert_size=read.size("moe_intermediate_size"),
            shared_expert_size=read.size("shared_expert_intermediate_size"),
        )
        for larger, smaller, names in (
            (config.num_heads, config.num_kv_heads, "num_attention_heads by num_key_value_heads"),
            (config.linear_value_heads, config.linear_key_heads, "linear_num_value_heads by linear_num_key_heads"),
        ):
            if larger % smaller:
                raise CheckpointError(f"config.json: cannot divide {names}: {larger} by {smaller}")
        if config.experts_per_token > config.num_experts:
            raise CheckpointError(
                f"config.json: num_experts_per_tok {config.experts_per_token} exceeds num_experts {config.num_experts}"
            )
        return config


class _Reader:
    """Checked access to the numbers of a JSON object."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"config.json: {name} is missing")
        return value

    def size(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self._get(name, default)
        if type(value) is not int or not least <= value <= _LARGEST:
            raise CheckpointError(f"config.json: {name} is {value!r}; it must be an integer from {least} to {_LARGEST}")
        return value

    def number(self, name: str, default: float | None, most: float) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0 < value <= most:
            raise CheckpointError(f"config.json: {name} is {value!r}; it must be above 0 and at most {most:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise CheckpointError(f"config.json: {name} is {value!r}; it must be true or false")
        return value


def _rope_parameters(text: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary settings: nested since transformers 5, flat before."""
    nested = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(nested, Mapping):
        raise CheckpointError("config.json: rope_parameters is not an object")
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"config.json: rope type {kind!r} is not supported; only 'default' is")
    flat = {name: text[name] for name in ("rope_theta", "partial_rotary_factor") if name in text}
    return {**flat, **nested}


def _tied(published: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """The outer flag rules where both are given: transformers ties the whole model by its top-level config."""
    holder = published if "tie_word_embeddings" in published else text
    return _Reader(holder).flag("tie_word_embeddings", False)


def _full_attention(text: Mapping[str, Any], num_layers: int, read: _Reader) -> tuple[bool, ...]:
    kinds = text.get("layer_types")
    if kinds is None:
        interval = read.size("full_attention_interval", 4)
        return tuple((layer + 1) % interval == 0 for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise CheckpointError(f"config.json: layer_types must list {num_layers} layers")
    known = {"full_attention": True, "linear_attention": False}
    for kind in kinds:
        if not isinstance(kind, str) or kind not in known:
            raise CheckpointError(f"config.json: layer type {kind!r} is not supported; supported: {', '.join(known)}")
    return tuple(known[kind] for kind in kinds)
