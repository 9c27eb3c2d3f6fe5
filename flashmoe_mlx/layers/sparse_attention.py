"""Full attention to a limited number of earlier tokens, which an indexer selects in blocks.

Source: transformers ``Qwen4ExpTextAttention`` and ``Qwen4ExpTextQSAIndexer``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import AttentionInputs, AttentionWeights, native
from flashmoe_mlx.custom_kernels.attention import mlx, reference
from flashmoe_mlx.layers.attention import Attention
from flashmoe_mlx.layers.kv_cache import IndexedCache, KVCache
from flashmoe_mlx.layers.linear import Linear, project_all
from flashmoe_mlx.layers.sequences import by_sequence

_SCORES = 2**26
"""The largest number of attention scores that exist at the same time."""


@dataclass(frozen=True, slots=True)
class Indexer:
    """Selects the tokens to which a token attends.

    The tokens of a sequence form blocks of ``block`` tokens. A token attends to the ``most`` complete blocks with the
    highest scores, and to the tokens behind the last complete block.

    Attributes:
        qk_proj: gives the queries of all heads, then one key.
        weights: the heads, norms and rotation of queries and keys.
        block: tokens of a block.
        most: blocks to which a token attends.
    """

    qk_proj: Linear
    weights: AttentionWeights
    block: int
    most: int

    @property
    def dense_tokens(self) -> int:
        """The number of tokens of a sequence up to which each token attends to all."""
        return (self.most + 1) * self.block - 1

    def block_keys(self, cache: IndexedCache) -> mx.array:
        """Return the keys of the complete blocks in ``cache``, [blocks, D]: normalized means, rotated."""
        known = 0 if cache.block_keys is None else len(cache.block_keys)
        complete = cache.length // self.block
        if complete > known:
            assert cache.index_keys is not None
            keys = cache.index_keys[0, 0, known * self.block : complete * self.block].astype(mx.float32)
            means = keys.reshape(complete - known, self.block, -1).mean(axis=1).astype(cache.index_keys.dtype)
            normed = mx.fast.rms_norm(means, self.weights.k_norm, self.weights.eps)
            # A rotation to the beginning of each block: positions that are ``block`` apart.
            placed = _rotate(normed[:, None], self.weights, known * self.block, self.block)[:, 0]
            earlier = cache.block_keys
            cache.block_keys = placed if earlier is None else mx.concatenate([earlier, placed])
        assert cache.block_keys is not None
        return cache.block_keys

    def scores(self, queries: mx.array, keys: mx.array, start: int) -> mx.array:
        """Compute the scores f32 [T, blocks] of blocks for tokens from position ``start`` on; -inf where incomplete.

        Args:
            queries: [T, heads * D], not yet normalized.
            keys: the result of ``block_keys``.
            start: the position of the first token.
        """
        length = len(queries)
        heads = queries.reshape(length, self.weights.heads, self.weights.head_dim)
        normed = mx.fast.rms_norm(heads, self.weights.q_norm, self.weights.eps)
        placed = _rotate(normed, self.weights, start, 1).astype(mx.float32)
        products = placed.swapaxes(0, 1) @ keys.astype(mx.float32).T
        total = mx.maximum(products, 0).sum(axis=0) * self.weights.head_dim**-0.5
        complete = (mx.arange(start, start + length)[:, None] + 1) // self.block
        return mx.where(mx.arange(len(keys))[None] < complete, total, -mx.inf)

    def select(self, scores: mx.array, start: int) -> mx.array:
        """Return the indices [T, most] of the blocks with the highest ``scores`` of tokens from ``start`` on.

        Equal scores are common: a block that no head finds similar has a score of 0. On a CPU the choice among them is
        that of transformers on a CPU, whose order is not that of the blocks; elsewhere, the earliest blocks are chosen.
        """
        if mx.default_device() == mx.cpu and native.extension() is not None:
            complete = (np.arange(start, start + len(scores), dtype=np.int32) + 1) // self.block
            return mx.array(native.largest(np.asarray(scores), complete, self.most))
        return mx.argsort(-scores, axis=-1)[:, : self.most]


@dataclass(frozen=True, slots=True)
class SparseAttention(Attention):
    """The weights of one layer; ``indexer`` selects tokens once a sequence is long."""

    indexer: Indexer | None = None

    def __call__(
        self,
        projected: Sequence[mx.array],
        caches: Sequence[KVCache],
        lengths: Sequence[int],
        residual: mx.array | None,
    ) -> mx.array:
        """Attend from each token to tokens of its sequence up to itself; see ``Attention``."""
        return self.o_proj(by_sequence(self._select, projected, caches, lengths), residual)

    @property
    def projections(self) -> tuple[Linear, ...]:
        """The matrices of ``project``: queries, keys, values, and queries and key of the indexer."""
        assert self.indexer is not None
        return self.q_proj, self.k_proj, self.v_proj, self.indexer.qk_proj

    def project(self, x: mx.array) -> tuple[mx.array, ...]:
        """Apply ``projections`` to ``x`` [T, hidden]."""
        return project_all(self.projections, x)

    def new_cache(self) -> IndexedCache:
        """Return the cache of a sequence without tokens."""
        return IndexedCache()

    def _select(self, cache: IndexedCache, q_and_gate: mx.array, k: mx.array, v: mx.array, index: mx.array) -> mx.array:
        """Attend within one sequence; all arrays are [T, ...] of its new tokens."""
        assert self.indexer is not None
        width = self.indexer.weights.head_dim
        queries, keys = index[:, :-width], index[:, -width:]
        cache.append_index_keys(keys)
        # Tokens that attend to all earlier tokens need no indexer.
        dense = min(len(k), max(0, self.indexer.dense_tokens - cache.length))
        parts = []
        if dense:
            parts.append(Attention.attend(self, cache, q_and_gate[:dense], k[:dense], v[:dense]))
        while dense < len(k):
            count = max(1, min(len(k) - dense, _SCORES // (self.weights.heads * (cache.length + len(k)))))
            rows = slice(dense, dense + count)
            parts.append(self._attend_to_selected(cache, q_and_gate[rows], k[rows], v[rows], queries[rows]))
            mx.eval(parts[-1], cache.arrays())
            dense += count
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def _attend_to_selected(
        self, cache: IndexedCache, q_and_gate: mx.array, k: mx.array, v: mx.array, queries: mx.array
    ) -> mx.array:
        assert self.indexer is not None
        start, length, block = cache.length, len(k), self.indexer.block
        keys, values = self.room(cache, length, q_and_gate.dtype)
        cache.length += length
        scores = self.indexer.scores(queries, self.indexer.block_keys(cache), start)
        best = self.indexer.select(scores, start)

        def attend_to_few(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
            """Attend from one token to copies of the selected keys and values."""
            chosen = (mx.sort(best[0])[:, None] * block + mx.arange(block)).reshape(-1)
            tail = mx.arange((start + 1) // block * block, start + 1)
            tokens = mx.concatenate([chosen.astype(mx.int32), tail.astype(mx.int32)])
            return mlx.attention(queries, keys[:, :, tokens], values[:, :, tokens])

        def attend_to_visible(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
            """Attend from several tokens to all keys and values, with a mask."""
            chosen = mx.put_along_axis(mx.zeros(scores.shape, mx.bool_), best, mx.array(True), axis=-1)
            chosen = chosen & mx.isfinite(scores)
            positions, tokens = mx.arange(start, start + length)[:, None], mx.arange(start + length)[None]
            whole = mx.repeat(chosen, block, axis=-1)
            missing = mx.zeros((length, start + length - whole.shape[1]), mx.bool_)
            behind = (tokens >= (positions + 1) // block * block) & (tokens <= positions)
            mask = mx.concatenate([whole, missing], axis=-1) | behind
            scale = queries.shape[-1] ** -0.5
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)

        inputs = AttentionInputs(q_and_gate, k, v, self.weights, keys, values, start)
        attend = attend_to_few if length == 1 else attend_to_visible
        y, cache.keys, cache.values = reference.gated_attention(inputs, attend, mlx.rotate)
        return y


def _rotate(x: mx.array, weights: AttentionWeights, start: int, step: int) -> mx.array:
    """Rotate ``x`` [T, heads, D], whose positions are ``start``, ``start + step`` and so on."""
    pairs = weights.rotary_dim // 2
    angles = np.outer(np.arange(len(x)) * step + start, weights.rotations())[:, None]
    cosine, sine = (mx.array(part(angles), mx.float32) for part in (np.cos, np.sin))
    low, high, rest = mx.split(x.astype(mx.float32), [pairs, weights.rotary_dim], axis=-1)
    rotated = mx.concatenate([low * cosine - high * sine, high * cosine + low * sine, rest], axis=-1)
    return rotated.astype(x.dtype)
