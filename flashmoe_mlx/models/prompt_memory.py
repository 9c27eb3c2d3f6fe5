"""The memory of the tokens of a prompt while they go through a layer together."""

from dataclasses import dataclass

from flashmoe_mlx.custom_kernels.routed_experts.grouped import AT_ONCE, MOST_PAIRS
from flashmoe_mlx.layers.sequences import BLOCK
from flashmoe_mlx.models.config import ModelConfig

MOST_TOKENS = 32_768
"""The largest number of tokens that go through a layer together.

Reads then take less time than arithmetic: at the geometry of the 397B, a token needs 34 GFLOP, 3.4 ms at 10 TFLOP/s,
and its share of a pass is 6.6 MB, 3.3 ms at 2 GB/s. More tokens would delay other requests for a small gain.
"""
_CHOICE = 96
"""Bytes for each choice of an expert: its index, weight and row, and the sorted order of all choices."""
_SCORES = 2**28
"""Bytes of the attention scores that exist at the same time on a GPU."""
_RECURRENCE = 40
"""Memory of a recurrence in chunks on a GPU, in relation to its values in f32."""


@dataclass(frozen=True)
class PromptMemory:
    """Bytes of tokens that go through a layer together.

    Attributes:
        per_token: of each of the tokens, without caches.
        block: the intermediate results for a block of ``BLOCK`` tokens.
        cache_per_token: the caches of all layers for each token of the sequence.
        cache_fixed: the caches of all layers at any length.
        most_tokens: the largest number of tokens that go through a layer together.
    """

    per_token: int
    block: int
    cache_per_token: int
    cache_fixed: int
    most_tokens: int = MOST_TOKENS

    def of(self, tokens: int) -> int:
        """Return the bytes of ``tokens`` tokens."""
        return tokens * self.per_token + min(tokens, BLOCK) * self.block // BLOCK


def prompt_memory(config: ModelConfig, experts_k: int, activation_bytes: int) -> PromptMemory:
    """Compute the memory of the tokens of a prompt, on a CPU if activations have 4 bytes, else on a GPU.

    A layer holds the residual stream, its normalized form, and the sum of the experts in f32; on a GPU, where sum and
    residual have different types, also the output of the shared expert and the new residual.
    """
    on_gpu = activation_bytes < 4  # f32
    hidden = config.hidden_size
    streams = hidden * (5 * activation_bytes + 4 if on_gpu else 3 * activation_bytes)
    # Further streams, before and after a block, and their normalized form.
    streams += 3 * (config.residual_size - hidden) * activation_bytes
    mixers = [config.mixer(layer) for layer in range(config.num_layers)]
    block = BLOCK * (max(mixer.working_width for mixer in mixers) + 3 * config.residual_size) * activation_bytes
    if on_gpu:
        block += max(_SCORES, _RECURRENCE * 4 * BLOCK * max(mixer.recurrent_width for mixer in mixers))
        # Dense experts, and the inputs, inner products and outputs of pairs of an expert and a token.
        dense = AT_ONCE * 3 * hidden * config.expert_size
        block += activation_bytes * (dense + MOST_PAIRS * (2 * hidden + 4 * config.expert_size))
    caches = config.cache_sizes(activation_bytes)
    kept = sum(cache.per_token for cache in caches), sum(cache.fixed for cache in caches)
    return PromptMemory(streams + experts_k * _CHOICE, block, *kept)
