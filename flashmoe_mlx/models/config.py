"""The geometry of a Qwen3.5-MoE model, read from the ``config.json`` that it was published with.

Field names and defaults: ``transformers`` ``Qwen3_5MoeTextConfig``. A config is untrusted input: every number is
checked here, once, and everything else in the package may rely on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.fields import LARGEST_SIZE, Reader, refuse_other_arithmetic, shown
from flashmoe_mlx.layers.rope import Rope, read_rope
from flashmoe_mlx.models.family import refuse_other_family

_MOST_LAYERS = 2**12
_MOST_EXPERTS = 2**16
"""Whatever is made for each layer or expert stays small until a file has proven that they are there."""


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
    rope: Rope
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
            CheckpointError: the model is of another kind, a field asks for arithmetic that is not done here, or a value
                is missing, mistyped or out of range.
        """
        refuse_other_family(published)
        text = text_of(published)
        refuse_other_arithmetic(text)
        read = Reader(text)
        num_layers = read.size("num_hidden_layers", most=_MOST_LAYERS)
        head_dim = read.size("head_dim", 256)
        max_context = read.size("max_position_embeddings", 32768)
        rope = read_rope(text, head_dim, max_context)
        if rope.yarn is not None:
            max_context = max(max_context, min(LARGEST_SIZE, int(rope.yarn.original_context * rope.yarn.factor)))
        config = cls(
            num_layers=num_layers,
            hidden_size=read.size("hidden_size"),
            vocab_size=read.size("vocab_size"),
            max_context=max_context,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6, most=1.0),
            tie_word_embeddings=_tied(published, text),
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
            num_experts=read.size("num_experts", most=_MOST_EXPERTS),
            experts_per_token=read.size("num_experts_per_tok"),
            expert_size=read.size("moe_intermediate_size"),
            shared_expert_size=read.size("shared_expert_intermediate_size"),
        )
        for larger, smaller, names in (
            (config.num_heads, config.num_kv_heads, "num_attention_heads by num_key_value_heads"),
            (config.linear_value_heads, config.linear_key_heads, "linear_num_value_heads by linear_num_key_heads"),
        ):
            if larger % smaller:
                raise CheckpointError(
                    f"config.json: cannot divide {names}: {larger} by {smaller}", code="invalid_config"
                )
        if config.experts_per_token > config.num_experts:
            raise CheckpointError(
                f"config.json: num_experts_per_tok {config.experts_per_token} exceeds num_experts {config.num_experts}",
                code="invalid_config",
            )
        return config


def text_of(published: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text part of a ``config.json``: ``text_config`` where there is one, else the whole.

    Raises:
        CheckpointError: ``text_config`` is no object.
    """
    text = published.get("text_config")
    if text is None:
        return published
    if not isinstance(text, Mapping):
        raise CheckpointError("config.json: text_config is not an object", code="invalid_config")
    return text


def _tied(published: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """The outer flag rules where both are given: transformers ties the whole model by its top-level config."""
    holder = published if "tie_word_embeddings" in published else text
    return Reader(holder).flag("tie_word_embeddings", False)


def _full_attention(text: Mapping[str, Any], num_layers: int, read: Reader) -> tuple[bool, ...]:
    kinds = text.get("layer_types")
    if kinds is None:
        interval = read.size("full_attention_interval", 4)
        return tuple((layer + 1) % interval == 0 for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise CheckpointError(f"config.json: layer_types must list {num_layers} layers", code="invalid_config")
    known = {"full_attention": True, "linear_attention": False}
    for kind in kinds:
        if not isinstance(kind, str) or kind not in known:
            raise CheckpointError(
                f"config.json: layer type {shown(kind)} is not supported; supported: {', '.join(known)}",
                code="invalid_config",
            )
    return tuple(known[kind] for kind in kinds)
