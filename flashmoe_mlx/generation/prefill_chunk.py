"""The number of prompt tokens that go through a layer together.

A layer reads each expert once for all tokens that go through it together, so a prompt that goes through as a whole
costs one pass over its experts. Its tokens then need memory at the same time.
"""

from flashmoe_mlx.layers.sequences import BLOCK
from flashmoe_mlx.models.prompt_memory import PromptMemory
from flashmoe_mlx.stores.memory import available_memory

_SHARE = 0.5
"""Share of the free memory that a prompt may take; the rest is for the page cache and other programs."""


def choose_chunk(need: PromptMemory, tokens: int, reserved: int = 0) -> int:
    """Choose how many tokens of a prompt go through a layer together: all of them, if memory allows.

    The chunks of a longer prompt have similar sizes; without memory for more, about ``BLOCK`` tokens.

    Args:
        need: the memory of prompt tokens.
        tokens: the length of the prompt.
        reserved: bytes of free memory that something else will occupy, such as the prompt cache.
    """
    if tokens <= BLOCK:
        return BLOCK
    kept = need.cache_per_token * tokens + need.cache_fixed
    room = int(_SHARE * (available_memory() - reserved)) - need.block - kept
    most = max(BLOCK, min(room // need.per_token, need.most_tokens))
    return -(-tokens // -(-tokens // most))
