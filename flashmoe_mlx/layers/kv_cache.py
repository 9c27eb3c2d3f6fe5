"""Keys and values of a sequence in a layer of attention."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.layers.recurrent_state import copied

_GROWTH = 256
"""The least number of tokens by which a KV cache grows."""
_GROWTH_SHARE = 8
"""A longer cache grows by this part of its capacity."""


@dataclass(slots=True)
class KVCache:
    """Keys and values of an attention layer, [1, kv heads, capacity, head dim], of which ``length`` tokens are filled.

    The capacity grows by 256 tokens, or by an eighth if that is more.
    """

    keys: mx.array | None = None
    values: mx.array | None = None
    length: int = 0

    @property
    def nbytes(self) -> int:
        """The size in bytes, unused capacity included."""
        return sum(array.nbytes for array in self.arrays())

    @property
    def can_trim(self) -> bool:
        """True, because keys and values do not depend on later tokens."""
        return True

    def arrays(self) -> list[mx.array]:
        """Return keys and values; none before the first token."""
        return [array for array in (self.keys, self.values) if array is not None]

    def reserve(self, tokens: int, kv_heads: int, head_dim: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Return keys and values with room for ``tokens`` more; new arrays are evaluated, since kernels write to them.

        Args:
            tokens: the number of tokens to append.
            kv_heads: heads of keys and values.
            head_dim: the size of a head.
            dtype: the type of new arrays.
        """
        end = self.length + tokens
        if self.keys is None or self.values is None:
            self.keys, self.values = (_room(kv_heads, end, head_dim, dtype) for _ in range(2))
        # One after the other, so that only one of them is in memory twice.
        self.keys = _grown(self.keys, end)
        self.values = _grown(self.values, end)
        return self.keys, self.values

    def snapshot(self) -> "KVCache":
        """Return a copy without unused capacity."""
        used = rounded_up(self.length)
        if self.keys is None or self.values is None:
            return KVCache()
        return KVCache(copied(self.keys[:, :, :used]), copied(self.values[:, :, :used]), self.length)

    def restore(self, snapshot: "KVCache") -> None:
        """Return to the state of ``snapshot``."""
        copy = snapshot.snapshot()
        self.keys, self.values, self.length = copy.keys, copy.values, copy.length

    def trim(self, length: int) -> None:
        """Keep the first ``length`` tokens; the next tokens overwrite the rest."""
        self.length = length

    def mark(self) -> int:
        """Return the number of tokens."""
        return self.length

    def rewind(self, mark: int) -> None:
        """Keep the first ``mark`` tokens."""
        self.length = mark

    def must_grow(self, tokens: int) -> bool:
        """Whether the capacity is less than ``tokens`` more tokens need."""
        return self.keys is not None and self.length + tokens > self.keys.shape[2]

    @property
    def keeps_tokens(self) -> bool:
        """True, because every token has a key and a value."""
        return True

    def part(self, start: int, end: int) -> "KVCache":
        """Return a copy of the tokens from ``start`` to ``end``, without unused capacity."""
        assert self.keys is not None
        assert self.values is not None
        return KVCache(copied(self.keys[:, :, start:end]), copied(self.values[:, :, start:end]), end - start)

    @classmethod
    def of_arrays(cls, arrays: Sequence[mx.array], length: int) -> "KVCache":
        """Return the cache of keys and values of ``length`` tokens."""
        keys, values = arrays
        return cls(keys, values, length)

    def assemble(self, parts: Sequence["KVCache"]) -> None:
        """Replace the contents by copies of the tokens of ``parts``."""
        self.length = sum(part.length for part in parts)
        self.keys = _joined([(part.keys, part.length) for part in parts])
        self.values = _joined([(part.values, part.length) for part in parts])


@dataclass(slots=True)
class IndexedCache(KVCache):
    """Keys and values, and the keys of an indexer.

    Attributes:
        index_keys: a key for each token, [1, 1, capacity, D].
        block_keys: keys of complete blocks of tokens, [blocks, D], which follow from ``index_keys``; None to compute
            them when they are needed.
    """

    index_keys: mx.array | None = None
    block_keys: mx.array | None = None

    def append_index_keys(self, keys: mx.array) -> None:
        """Add the indexer's ``keys`` [T, D] of tokens that have no keys and values yet."""
        end = self.length + len(keys)
        kept = self.index_keys
        if kept is None:
            kept = _room(1, end, keys.shape[1], keys.dtype)
        kept = _grown(kept, end)
        kept[:, :, self.length : end] = keys[None, None]
        self.index_keys = kept

    def arrays(self) -> list[mx.array]:
        """Return keys, values, and the indexer's keys; none before the first token."""
        index_keys = [] if self.index_keys is None else [self.index_keys]
        return [*KVCache.arrays(self), *index_keys]

    def snapshot(self) -> "IndexedCache":
        """Return a copy without unused capacity."""
        kept = KVCache.snapshot(self)
        if self.index_keys is None:
            return IndexedCache()
        return IndexedCache(
            kept.keys, kept.values, kept.length, copied(self.index_keys[:, :, : rounded_up(self.length)])
        )

    def restore(self, snapshot: KVCache) -> None:
        """Return to the state of ``snapshot``."""
        assert isinstance(snapshot, IndexedCache)
        KVCache.restore(self, snapshot)
        self.index_keys = None if snapshot.index_keys is None else copied(snapshot.index_keys)
        self.block_keys = None

    def trim(self, length: int) -> None:
        """Keep the first ``length`` tokens; the next tokens overwrite the rest."""
        KVCache.trim(self, length)
        self.block_keys = None

    def rewind(self, mark: int) -> None:
        """Keep the first ``mark`` tokens."""
        self.trim(mark)

    def part(self, start: int, end: int) -> "IndexedCache":
        """Return a copy of the tokens from ``start`` to ``end``, without unused capacity."""
        assert self.index_keys is not None
        kept = KVCache.part(self, start, end)
        return IndexedCache(kept.keys, kept.values, kept.length, copied(self.index_keys[:, :, start:end]))

    @classmethod
    def of_arrays(cls, arrays: Sequence[mx.array], length: int) -> "IndexedCache":
        """Return the cache of keys, values and the indexer's keys of ``length`` tokens."""
        keys, values, index_keys = arrays
        return cls(keys, values, length, index_keys)

    def assemble(self, parts: Sequence[KVCache]) -> None:
        """Replace the contents by copies of the tokens of ``parts``."""
        KVCache.assemble(self, parts)
        own = [part for part in parts if isinstance(part, IndexedCache)]
        self.index_keys, self.block_keys = _joined([(part.index_keys, part.length) for part in own]), None


def rounded_up(tokens: int) -> int:
    """Return the least capacity of a KV cache for ``tokens`` tokens."""
    return -(-tokens // _GROWTH) * _GROWTH


def _grown(rows: mx.array, end: int) -> mx.array:
    """Return ``rows`` with room for ``end`` tokens; every token is copied a few times at most, however long it gets."""
    capacity = rows.shape[2]
    if end <= capacity:
        return rows
    missing = max(end - capacity, capacity // _GROWTH_SHARE)
    grown = mx.concatenate([rows, _room(rows.shape[1], missing, rows.shape[3], rows.dtype)], axis=2)
    mx.eval(grown)
    return grown


def _room(kv_heads: int, tokens: int, head_dim: int, dtype: mx.Dtype) -> mx.array:
    room = mx.contiguous(mx.zeros((1, kv_heads, rounded_up(tokens), head_dim), dtype))
    mx.eval(room)
    return room


def _joined(parts: Sequence[tuple[mx.array | None, int]]) -> mx.array | None:
    """Return the first tokens of each array [1, kv heads, capacity, head dim], with capacity for more tokens."""
    arrays = [array[:, :, :length] for array, length in parts if array is not None]
    if not arrays:
        return None
    _, heads, _, width = arrays[0].shape
    length = sum(array.shape[2] for array in arrays)
    spare = mx.zeros((1, heads, rounded_up(length + 1) - length, width), arrays[0].dtype)
    joined = mx.contiguous(mx.concatenate([*arrays, spare], axis=2))
    mx.eval(joined)  # kernels write to it
    return joined
