"""The number of prompt tokens that go through a layer together.

A layer reads each expert once for all tokens that go through it together, so a prompt that goes through as a whole
costs one pass over its experts. Its tokens then need memory at the same time.
"""

from flashmoe_mlx.layers.sequences import BLOCK
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.models.prompt_memory import prompt_memory
from flashmoe_mlx.stores.memory import available_memory

MOST_TOKENS = 32_768
"""The largest number that is chosen.

Reads then take less time than arithmetic: at the geometry of the 397B, a token needs 34 GFLOP, 3.4 ms at 10 TFLOP/s,
and its share of a pass is 6.6 MB, 3.3 ms at 2 GB/s. More tokens would delay other requests for a small gain.
"""
_SHARE = 0.5
"""Share of the free memory that a prompt may take; the rest is for the page cache and other programs."""


def choose_chunk(config: ModelConfig, experts_k: int, activation_bytes: int, tokens: int, reserved: int = 0) -> int:
    """Choose how many tokens of a prompt go through a layer together: all of them, if memory allows.

    The chunks of a longer prompt have similar sizes; without memory for more, about ``BLOCK`` tokens.

    Args:
        config: the geometry of the model.
        experts_k: routed experts of a token.
        activation_bytes: the bytes of an activation.
        tokens: the length of the prompt.
        reserved: bytes of free memory that something else will occupy, such as the prompt cache.
    """
    if tokens <= BLOCK:
        return BLOCK
    need = prompt_memory(config, experts_k, activation_bytes)
    caches = [config.mixer(layer).cache_size(activation_bytes) for layer in range(config.num_layers)]
    kept = sum(cache.per_token * tokens + cache.fixed for cache in caches)
    room = int(_SHARE * (available_memory() - reserved)) - need.block - kept
    most = max(BLOCK, min(room // need.per_token, MOST_TOKENS))
    return -(-tokens // -(-tokens // most))
