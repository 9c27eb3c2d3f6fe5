"""Compute sizes of a model from its geometry: weights, bytes on disk, bytes in memory."""

from dataclasses import dataclass
from math import prod

from flashmoe_mlx.formats.record import PROJECTIONS, RecordLayout
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.models.parameters import EMBEDDING, Kind
from flashmoe_mlx.models.prompt_memory import MOST_TOKENS, prompt_memory

GROUP_SIZE = 64
LEAST_SLOTS = 32
"""Slots of a store without a budget: for the experts of a fetch and for as many that are read ahead."""
_RUNTIME = 130_000_000
"""Bytes of Python and of MLX."""


def touched_weights(config: ModelConfig) -> int:
    """Count the resident weights that multiply a token: all matrices, but no embedding that is not also the head."""
    return sum(
        prod(parameter.shape)
        for parameter in config.resident_parameters()
        if parameter.kind is Kind.MATRIX and (parameter.name != EMBEDDING or config.tie_word_embeddings)
    )


def expert_weights(config: ModelConfig) -> int:
    """Count the weights of an expert."""
    return len(PROJECTIONS) * config.hidden_size * config.expert_size


def record_bytes(config: ModelConfig, bits: int, group_size: int = GROUP_SIZE) -> int:
    """Compute the bytes of an expert of ``bits`` bits on disk and in a slot."""
    return RecordLayout.uniform(config.hidden_size, config.expert_size, bits, group_size, "BF16").record_bytes


def resident_bytes(config: ModelConfig, bits: int, scale_bytes: int = 2, group_size: int = GROUP_SIZE) -> int:
    """Compute the bytes of the resident weights.

    Args:
        config: the geometry of the model.
        bits: the width of matrices, unless a matrix needs more.
        scale_bytes: the bytes of each scale, bias and entry of a vector.
        group_size: the number of weights that share a scale and a bias.
    """
    total = 0
    for parameter in config.resident_parameters():
        size = prod(parameter.shape)
        if parameter.kind is not Kind.MATRIX or parameter.shape[1] % group_size:
            total += size * scale_bytes
        else:
            total += size * max(bits, parameter.least_bits) // 8 + 2 * size // group_size * scale_bytes
    return total


def table_bytes(config: ModelConfig, value_bytes: int = 2) -> int:
    """Compute the bytes on disk of the tables, which a pack keeps as they are published; dense in bf16 by default."""
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
    config: ModelConfig,
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
    caches = config.cache_sizes(activation_bytes, kv_bits)
    return MemoryNeed(
        resident=resident_bytes(config, resident_bits, scale_bytes, group_size),
        keys_and_values=context * sum(cache.per_token for cache in caches),
        state=sum(cache.fixed for cache in caches),
        slots=LEAST_SLOTS * (slot_bytes or record_bytes(config, expert_bits, group_size)),
        prompt=prompt_memory(config, config.experts_per_token, activation_bytes).of(min(context, MOST_TOKENS)),
        runtime=_RUNTIME,
    )
