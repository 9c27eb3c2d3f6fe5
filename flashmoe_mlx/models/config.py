"""The part of a model's geometry that all families share, and readers of the fields that they share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.fields import LARGEST_SIZE, Reader, shown
from flashmoe_mlx.layers.rope import Rope
from flashmoe_mlx.models.blocks import CacheSize, MixerBlock
from flashmoe_mlx.models.feed_forward import FeedForwardBlock, MoeBlock
from flashmoe_mlx.models.parameters import EMBEDDING, FINAL_NORM, HEAD, Kind, Parameter, Table

__all__ = [
    "MOST_EXPERTS",
    "MOST_LAYERS",
    "ModelConfig",
    "ModelSize",
    "context_with_yarn",
    "layer_prefix",
    "read_mlp_layers",
    "read_num_experts",
    "read_tied",
    "refuse_too_many_chosen",
    "refuse_unequal_division",
    "text_part",
]

MOST_LAYERS = 2**12
MOST_EXPERTS = 2**16
"""Limits for objects that are made for each layer or expert before any file has proven that it exists."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The sizes of a model that do not depend on its architecture.

    Attributes:
        num_layers: layers with routed experts.
        hidden_size: elements of the residual stream.
        vocab_size: tokens of the vocabulary.
        max_context: the largest number of tokens of a sequence.
        num_experts: routed experts of a layer.
        experts_per_token: routed experts that a token chooses in a layer.
        expert_size: elements of the hidden layer of an expert.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context: int
    num_experts: int
    experts_per_token: int
    expert_size: int

    @property
    def num_moe_layers(self) -> int:
        """The number of layers with routed experts."""
        return self.num_layers


@dataclass(frozen=True, slots=True)
class ModelConfig(ModelSize, ABC):
    """The sizes of a model in elements, heads, layers or experts; a family adds its own and describes its layers."""

    norm: ClassVar[Kind] = Kind.PLAIN
    """The form in which checkpoints store the norms of the residual stream."""

    rms_norm_eps: float
    tie_word_embeddings: bool

    @abstractmethod
    def mixer(self, layer: int) -> MixerBlock:
        """Return the block of ``layer`` that mixes tokens."""

    @abstractmethod
    def feed_forward(self, layer: int) -> FeedForwardBlock:
        """Return the mixture of experts of ``layer``, or its MLP."""

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with routed experts; stores, packs and traces number these layers from 0 in this order."""
        return tuple(layer for layer in range(self.num_layers) if isinstance(self.feed_forward(layer), MoeBlock))

    @property
    def num_moe_layers(self) -> int:
        """The number of layers with routed experts."""
        return len(self.moe_layers)

    @property
    def residual_size(self) -> int:
        """The elements of a token in the residual stream between two layers."""
        return self.hidden_size

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables that stay in storage."""
        return ()

    def cache_sizes(self, activation_bytes: int, kv_bits: int | None = None) -> list[CacheSize]:
        """Compute the sizes of the caches of all layers, for activations of ``activation_bytes`` bytes each."""
        return [self.mixer(layer).cache_size(activation_bytes, kv_bits) for layer in range(self.num_layers)]

    def layer_parameters(self, layer: int) -> Iterator[Parameter]:
        """Yield the resident parameters of ``layer`` in the order in which a token meets them."""
        prefix = layer_prefix(layer)
        yield Parameter(f"{prefix}input_layernorm.weight", self.norm, (self.hidden_size,))
        yield from self.mixer(layer).parameters(prefix)
        yield from self.feed_forward(layer).parameters(prefix)

    def resident_parameters(self) -> Iterator[Parameter]:
        """Yield all resident parameters in the order in which a token meets them."""
        yield Parameter(EMBEDDING, Kind.MATRIX, (self.vocab_size, self.hidden_size))
        for layer in range(self.num_layers):
            yield from self.layer_parameters(layer)
        yield Parameter(FINAL_NORM, self.norm, (self.hidden_size,))
        if not self.tie_word_embeddings:
            yield Parameter(HEAD, Kind.MATRIX, (self.vocab_size, self.hidden_size))


def layer_prefix(layer: int) -> str:
    """Return the prefix of the names of all parameters of ``layer``."""
    return f"model.layers.{layer}."


def text_part(published: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text part of a ``config.json``: ``text_config`` if it exists, otherwise the whole.

    Raises:
        CheckpointError: ``text_config`` is not an object.
    """
    text = published.get("text_config")
    if text is None:
        return published
    if not isinstance(text, Mapping):
        raise CheckpointError("config.json: text_config is not an object", code="invalid_config")
    return text


def read_tied(published: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Read whether the head is the embedding.

    The outer flag wins where both are given: transformers ties the whole model by its top-level config.
    """
    holder = published if "tie_word_embeddings" in published else text
    return Reader(holder).flag("tie_word_embeddings", False)


def read_mlp_layers(text: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Read the layers that have an MLP in place of experts: ``mlp_only_layers``, and gaps of ``decoder_sparse_step``.

    Source: transformers ``Qwen3MoeDecoderLayer``.

    Raises:
        CheckpointError: a value is malformed, or no layer has experts.
    """
    step = Reader(text).size("decoder_sparse_step", 1)
    listed = text.get("mlp_only_layers") or []
    if not isinstance(listed, list) or any(type(layer) is not int or layer < 0 for layer in listed):
        raise CheckpointError(
            f"config.json: mlp_only_layers is {shown(listed)}; it must list indices of layers", code="invalid_config"
        )
    layers = tuple(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step)
    if len(layers) == num_layers:
        raise CheckpointError(
            "config.json: mlp_only_layers and decoder_sparse_step leave no layer with experts: there is nothing to "
            "stream; use mlx-lm for this model",
            code="dense_model",
        )
    return layers


def read_num_experts(text: Mapping[str, Any]) -> int:
    """Read the number of routed experts, which transformers 5 may write as ``num_local_experts``.

    Raises:
        CheckpointError: both names have different values, or a value is missing or out of range.
    """
    names = [name for name in ("num_experts", "num_local_experts") if text.get(name) is not None]
    counts = {Reader(text).size(name, most=MOST_EXPERTS) for name in names or ["num_experts"]}
    if len(counts) > 1:
        raise CheckpointError("config.json: num_experts and num_local_experts differ", code="invalid_config")
    return counts.pop()


def context_with_yarn(max_context: int, rope: Rope) -> int:
    """Return the longest context in tokens: ``max_context``, or more if YaRN extends it."""
    if rope.yarn is None:
        return max_context
    return max(max_context, min(LARGEST_SIZE, int(rope.yarn.original_context * rope.yarn.factor)))


def refuse_unequal_division(larger: int, smaller: int, names: str) -> None:
    """Raise CheckpointError unless ``smaller`` divides ``larger``; ``names`` names both fields."""
    if larger % smaller:
        raise CheckpointError(f"config.json: cannot divide {names}: {larger} by {smaller}", code="invalid_config")


def refuse_too_many_chosen(config: ModelConfig) -> None:
    """Raise CheckpointError if a token chooses more experts than a layer has."""
    if config.experts_per_token > config.num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok {config.experts_per_token} exceeds num_experts {config.num_experts}",
            code="invalid_config",
        )
