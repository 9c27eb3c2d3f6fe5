"""Full attention of Qwen3.5: an output gate beside every query, q/k norms, rotary embedding of part of each head.

Source: transformers ``Qwen3_5MoeAttention``. Position sections for images collapse to plain positions in text.
"""

from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import Kernels
from flashmoe_mlx.model.cache import AttentionCache
from flashmoe_mlx.model.config import ModelConfig
from flashmoe_mlx.model.linear import Linear

_SCORES = 2**26
"""Most attention scores held at once; longer prompts go through in blocks of queries."""


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's weights; ``q_proj`` gives [query | gate] for each head."""

    config: ModelConfig
    kernels: Kernels
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: mx.array
    k_norm: mx.array

    def __call__(self, x: mx.array, cache: AttentionCache) -> mx.array:
        """[T, hidden] -> [T, hidden] after the tokens already in ``cache``."""
        config, length = self.config, x.shape[0]
        q_and_gate = self.q_proj(x).reshape(length, config.num_heads, 2 * config.head_dim)
        queries, gate = mx.split(q_and_gate, 2, axis=-1)
        keys = self.k_proj(x).reshape(length, config.num_kv_heads, config.head_dim)
        values = self.v_proj(x).reshape(length, config.num_kv_heads, config.head_dim)
        start = cache.length
        queries = self._rotate(mx.fast.rms_norm(queries, self.q_norm, config.rms_norm_eps), start)
        keys = self._rotate(mx.fast.rms_norm(keys, self.k_norm, config.rms_norm_eps), start)
        keys, values = cache.append(keys, values.swapaxes(0, 1)[None])

        step = max(1, _SCORES // (config.num_heads * keys.shape[2]))
        blocks = []
        for begin in range(0, length, step):
            end = min(begin + step, length)
            seen = start + end
            blocks.append(self.kernels.attention(queries[:, :, begin:end], keys[:, :, :seen], values[:, :, :seen]))
        mixed = blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)
        mixed = mixed.squeeze(0).swapaxes(0, 1) * mx.sigmoid(gate)
        return self.o_proj(mixed.reshape(length, config.num_heads * config.head_dim))

    def _rotate(self, x: mx.array, start: int) -> mx.array:
        """[T, heads, D] -> [1, heads, T, D]."""
        return mx.fast.rope(
            x.swapaxes(0, 1)[None],
            self.config.rope_dim,
            traditional=False,
            base=self.config.rope_theta,
            scale=1.0,
            offset=start,
        )
