"""Full attention of Qwen3.5: an output gate beside every query, q/k norms, rotary embedding of part of each head.

Source: transformers ``Qwen3_5MoeAttention``. Position sections for images collapse to plain positions in text.
"""

from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import AttentionInputs, AttentionWeights, Kernels
from flashmoe_mlx.layers.cache import AttentionCache
from flashmoe_mlx.layers.linear import Linear, together


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's weights; ``q_proj`` gives [query | gate] for each head."""

    weights: AttentionWeights
    kernels: Kernels
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear

    def __call__(self, x: mx.array, cache: AttentionCache, before: mx.array) -> mx.array:
        """[T, hidden] -> [T, hidden] after the tokens already in ``cache``, added to ``before``."""
        length, weights = x.shape[0], self.weights
        keys, values = cache.reserve(length, weights.kv_heads, weights.head_dim, x.dtype)
        q_and_gate, k, v = together((self.q_proj, self.k_proj, self.v_proj), x)
        y, cache.keys, cache.values = self.kernels.attention(
            AttentionInputs(q_and_gate, k, v, weights, keys, values, cache.length)
        )
        cache.length += length
        return self.o_proj(y, before)
