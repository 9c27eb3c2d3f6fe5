"""Compute sizes of a model from its geometry: weights, bytes on disk, bytes in memory."""

from dataclasses import dataclass
from math import prod

from flashmoe_mlx.adapters.config import AdaptedConfig
from flashmoe_mlx.adapters.model import adapted_prompt_memory
from flashmoe_mlx.formats.record import PROJECTIONS, RECORD_ALIGNMENT, RecordLayout
from flashmoe_mlx.models.blocks import CacheSize
from flashmoe_mlx.models.config import ModelConfig, ModelSize
from flashmoe_mlx.models.parameters import EMBEDDING, Kind
from flashmoe_mlx.models.prompt_memory import prompt_memory

GROUP_SIZE = 64
DENSE_BITS = 16
"""The width of weights of models of mlx-lm that are not quantized."""
LEAST_SLOTS = 32
"""Slots of a store without a budget: for the experts of a fetch and for as many that are read ahead."""
_RUNTIME = 130_000_000
"""Bytes of Python and of MLX."""


def touched_weights(config: ModelSize) -> int:
    """Count the resident weights that multiply a token: all matrices, but no embedding that is not also the head.

    Of models that run through mlx-lm, all resident weights are counted.
    """
    if isinstance(config, AdaptedConfig):
        return config.resident_weights
    assert isinstance(config, ModelConfig)
    return sum(
        prod(parameter.shape)
        for parameter in config.resident_parameters()
        if parameter.kind is Kind.MATRIX and (parameter.name != EMBEDDING or config.tie_word_embeddings)
    )


def expert_weights(config: ModelSize) -> int:
    """Count the weights of an expert."""
    if isinstance(config, AdaptedConfig):
        return config.expert_weights
    return len(PROJECTIONS) * config.hidden_size * config.expert_size


def record_bytes(config: ModelSize, bits: int, group_size: int = GROUP_SIZE) -> int:
    """Compute the bytes of an expert of ``bits`` bits on disk and in a slot."""
    if isinstance(config, AdaptedConfig):
        payload = _quantized_bytes(config.expert_weights, bits, 2, group_size)
        return -(-payload // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
    return RecordLayout.uniform(config.hidden_size, config.expert_size, bits, group_size, "BF16").record_bytes


def resident_bytes(config: ModelSize, bits: int, scale_bytes: int = 2, group_size: int = GROUP_SIZE) -> int:
    """Compute the bytes of the resident weights.

    Args:
        config: the geometry of the model.
        bits: the width of matrices, unless a matrix needs more.
        scale_bytes: the bytes of each scale, bias and entry of a vector.
        group_size: the number of weights that share a scale and a bias.
    """
    if isinstance(config, AdaptedConfig):
        return _quantized_bytes(config.resident_weights, bits, scale_bytes, group_size)
    assert isinstance(config, ModelConfig)
    total = 0
    for parameter in config.resident_parameters():
        size = prod(parameter.shape)
        if parameter.kind is not Kind.MATRIX or parameter.shape[1] % group_size:
            total += size * scale_bytes
        else:
            total += size * max(bits, parameter.least_bits) // 8 + 2 * size // group_size * scale_bytes
    return total


def _quantized_bytes(weights: int, bits: int, scale_bytes: int, group_size: int) -> int:
    """Compute the bytes of matrices of ``bits`` bits; 16 bits are dense."""
    scales = 0 if bits == DENSE_BITS else 2 * weights // group_size * scale_bytes
    return weights * bits // 8 + scales


def table_bytes(config: ModelSize, value_bytes: int = 2) -> int:
    """Compute the bytes on disk of the tables, which a pack keeps as they are published; dense in bf16 by default."""
    if not isinstance(config, ModelConfig):
        return 0
    return sum(table.rows * table.columns * value_bytes for table in config.tables)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of memory that a model needs before it keeps any expert.

    Attributes:
        resident: resident weights.
        keys_and_values: caches that grow with every token.
        state: caches of a fixed size.
        slots: the experts of one fetch, and as many that are read ahead.
        prompt: the tokens that go through a layer together.
        runtime: Python and MLX.
        prompt_cache: the states of earlier prompts and answers.
    """

    resident: int
    keys_and_values: int
    state: int
    slots: int
    prompt: int
    runtime: int
    prompt_cache: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        needed = self.resident + self.keys_and_values + self.state + self.slots + self.prompt + self.runtime
        return needed + self.prompt_cache


def memory_need(
    config: ModelSize,
    resident_bits: int,
    expert_bits: int,
    context: int,
    activation_bytes: int,
    scale_bytes: int,
    group_size: int = GROUP_SIZE,
    kv_bits: int | None = None,
    slot_bytes: int | None = None,
) -> MemoryNeed:
    """Compute the memory that a model needs for one sequence, whose tokens go through a layer together.

    Args:
        config: the geometry of the model.
        resident_bits: the width of resident matrices.
        expert_bits: the width of routed experts.
        context: the length of the sequence in tokens.
        activation_bytes: the bytes of an activation.
        scale_bytes: the bytes of a scale or bias of resident matrices.
        group_size: the number of weights that share a scale and a bias.
        kv_bits: the width of cached keys and values; None for that of activations.
        slot_bytes: the bytes of a slot for any expert; None for experts of ``expert_bits``.
    """
    if isinstance(config, AdaptedConfig):
        caches = [CacheSize(config.cache_width * activation_bytes)]
        prompt = adapted_prompt_memory(config.hidden_size, config.experts_per_token)
    else:
        assert isinstance(config, ModelConfig)
        caches = config.cache_sizes(activation_bytes, kv_bits)
        prompt = prompt_memory(config, config.experts_per_token, activation_bytes)
    return MemoryNeed(
        resident=resident_bytes(config, resident_bits, scale_bytes, group_size),
        keys_and_values=context * sum(cache.per_token for cache in caches),
        state=sum(cache.fixed for cache in caches),
        slots=LEAST_SLOTS * (slot_bytes or record_bytes(config, expert_bits, group_size)),
        prompt=prompt.of(min(context, prompt.most_tokens)),
        runtime=_RUNTIME,
    )
