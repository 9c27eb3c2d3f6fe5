"""Sizes of a model from its geometry: weights, bytes on disk, bytes in memory."""

from dataclasses import dataclass
from math import prod

from flashmoe_mlx.formats.record import RecordLayout
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.models.parameters import Kind, least_bits, resident_parameters

GROUP_SIZE = 64
_RUNTIME = 300_000_000
"""Bytes of Python, of MLX, and of one layer's buffers."""
LEAST_SLOTS = 16


def touched_weights(config: ModelConfig) -> int:
    """Count the resident weights that multiply a token: all matrices but an embedding that is not also the head."""
    matrices = (one for one in resident_parameters(config) if one.kind is Kind.MATRIX)
    return sum(prod(one.shape) for one in matrices if one.name != "model.embed_tokens" or config.tie_word_embeddings)


def expert_weights(config: ModelConfig) -> int:
    """Count the weights of an expert."""
    return 3 * config.hidden_size * config.expert_size


def record_bytes(config: ModelConfig, bits: int, group_size: int = GROUP_SIZE) -> int:
    """Compute the bytes of an expert on disk and in a slot."""
    return RecordLayout(config.hidden_size, config.expert_size, bits, group_size, "BF16").record_bytes


def resident_bytes(config: ModelConfig, bits: int, scale_bytes: int = 2, group_size: int = GROUP_SIZE) -> int:
    """Compute the bytes of the resident weights with matrices of ``bits``.

    Scales, biases and vectors have ``scale_bytes`` each.
    """
    total = 0
    for one in resident_parameters(config):
        size = prod(one.shape)
        if one.kind is not Kind.MATRIX or one.shape[1] % group_size:
            total += size * scale_bytes
        else:
            total += size * least_bits(one.name, bits) // 8 + 2 * size // group_size * scale_bytes
    return total


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of memory that a model needs before it keeps any expert; ``slots`` is the room for one fetch."""

    resident: int
    keys_and_values: int
    state: int
    slots: int
    runtime: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.resident + self.keys_and_values + self.state + self.slots + self.runtime


def memory_need(
    config: ModelConfig,
    resident_bits: int,
    expert_bits: int,
    context: int,
    activation_bytes: int,
    scale_bytes: int,
    group_size: int = GROUP_SIZE,
) -> MemoryNeed:
    """Compute the memory for a sequence of ``context`` tokens; activations and scales have so many bytes each."""
    full = sum(config.full_attention)
    delta = config.num_layers - full
    head_state = config.linear_value_heads * config.linear_value_dim * config.linear_key_dim
    conv = (config.linear_conv_kernel - 1) * config.conv_width
    return MemoryNeed(
        resident=resident_bytes(config, resident_bits, scale_bytes, group_size),
        keys_and_values=full * 2 * config.num_kv_heads * config.head_dim * context * activation_bytes,
        state=delta * (4 * head_state + activation_bytes * conv),
        slots=LEAST_SLOTS * record_bytes(config, expert_bits, group_size),
        runtime=_RUNTIME,
    )
