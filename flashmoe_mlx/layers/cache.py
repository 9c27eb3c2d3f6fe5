"""State of a sequence in every layer: keys and values, or the state of the recurrence."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

_GROWTH = 256


@dataclass(slots=True)
class AttentionCache:
    """Keys and values of a full-attention layer, [1, kv heads, capacity, head dim], filled up to ``length``.

    The capacity grows in steps of 256 tokens.
    """

    keys: mx.array | None = None
    values: mx.array | None = None
    length: int = 0

    def reserve(self, tokens: int, kv_heads: int, head_dim: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Return both arrays with room for ``tokens`` more, evaluated when they are new: kernels write into them."""
        end = self.length + tokens
        if self.keys is None or self.values is None:
            self.keys, self.values = (_room(kv_heads, end, head_dim, dtype) for _ in range(2))
        elif end > self.keys.shape[2]:
            missing = end - self.keys.shape[2]
            self.keys, self.values = (
                mx.concatenate([old, _room(kv_heads, missing, head_dim, dtype)], axis=2)
                for old in (self.keys, self.values)
            )
            mx.eval(self.keys, self.values)
        return self.keys, self.values


@dataclass(slots=True)
class DeltaCache:
    """Latest inputs of a convolution [kernel - 1, channels] and the recurrent state f32 [1, heads, Dv, Dk]."""

    conv: mx.array | None = None
    state: mx.array | None = None


@dataclass(slots=True)
class SequenceCache:
    """Caches of all layers; ``length`` is the number of tokens that went through them.

    Arrays inside are updated in place, so a copy needs copies of them. ``broken`` means that a pass failed or was
    cancelled half-way: some layers have seen tokens that others have not.
    """

    layers: list[AttentionCache | DeltaCache] = field(default_factory=list)
    length: int = 0
    broken: bool = False

    @classmethod
    def empty(cls, config: Any) -> "SequenceCache":
        """Return the caches of a sequence that has not begun."""
        return cls([AttentionCache() if full else DeltaCache() for full in config.full_attention])

    def arrays(self) -> list[mx.array]:
        """Return every array in the caches, so that they can be evaluated together."""
        found: list[mx.array | None] = []
        for layer in self.layers:
            found += (layer.keys, layer.values) if isinstance(layer, AttentionCache) else (layer.conv, layer.state)
        return [array for array in found if array is not None]


def _room(kv_heads: int, tokens: int, head_dim: int, dtype: mx.Dtype) -> mx.array:
    room = mx.contiguous(mx.zeros((1, kv_heads, -(-tokens // _GROWTH) * _GROWTH, head_dim), dtype))
    mx.eval(room)
    return room
