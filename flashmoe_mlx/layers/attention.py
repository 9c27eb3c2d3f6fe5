"""Full attention: norms of queries and keys, rotation of a part or all of each head, and in some models output gates.

Sources: transformers ``Qwen3_5MoeAttention`` and ``Qwen3MoeAttention``. Position sections for images are plain
positions in text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import AttentionBatch, AttentionInputs, AttentionWeights, Kernels
from flashmoe_mlx.custom_kernels.checks import CheckedKernel
from flashmoe_mlx.layers.kv_cache import KVCache
from flashmoe_mlx.layers.linear import Linear, project_all
from flashmoe_mlx.layers.sequences import by_sequence


@dataclass(frozen=True, slots=True)
class Attention:
    """The weights of one layer; ``q_proj`` gives [query | gate] for each head, or the query alone."""

    weights: AttentionWeights
    kernels: Kernels
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    joint: Linear | None = None
    """The first three projections as one matrix, for one token; see ``layers.linear.join``."""

    def __call__(
        self,
        projected: Sequence[mx.array],
        caches: Sequence[KVCache],
        lengths: Sequence[int],
        residual: mx.array | None,
    ) -> mx.array:
        """Attend from each token to the tokens of its sequence up to itself.

        Args:
            projected: the results of ``project`` for the new tokens of all sequences, one sequence after the other.
            caches: the cache of each sequence, which the new tokens join.
            lengths: the number of new tokens of each sequence.
            residual: [T, hidden], added to the result; None to add nothing.

        Returns:
            [T, hidden].
        """
        if len(caches) > 1 and self.kernels.attention_batch is not None:
            return self.o_proj(
                self._attend_together(self.kernels.attention_batch, projected, caches, lengths), residual
            )
        return self.o_proj(by_sequence(self.attend, projected, caches, lengths), residual)

    def _attend_together(
        self,
        kernel: Callable[[AttentionBatch], tuple[mx.array, ...]],
        projected: Sequence[mx.array],
        caches: Sequence[KVCache],
        lengths: Sequence[int],
    ) -> mx.array:
        """Attend within each of several sequences in one call of ``kernel``."""
        weights, (q_and_gate, k, v) = self.weights, projected
        room = [self.room(cache, length, q_and_gate.dtype) for cache, length in zip(caches, lengths, strict=True)]
        keys, values = zip(*room, strict=True)
        starts = [cache.length for cache in caches]
        y, *arrays = kernel(AttentionBatch(q_and_gate, k, v, weights, keys, values, starts, list(lengths)))
        for cache, length, kept in zip(caches, lengths, zip(arrays[::2], arrays[1::2], strict=True), strict=True):
            cache.keys, cache.values = kept
            cache.length += length
        return y

    def project(self, x: mx.array) -> tuple[mx.array, ...]:
        """Compute queries with their gates, keys, and values, each [T, ...], of ``x`` [T, hidden]."""
        return project_all(self.projections, x)

    @property
    def projections(self) -> tuple[Linear, ...]:
        """The matrices of ``project``."""
        return self.q_proj, self.k_proj, self.v_proj

    def new_cache(self) -> KVCache:
        """Return the cache of a sequence without tokens."""
        return KVCache()

    def room(self, cache: KVCache, tokens: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Return the keys and values of ``cache``, with room for ``tokens`` more, for activations of type ``dtype``."""
        rows = self.weights.rows
        return cache.reserve(tokens, self.weights.kv_heads, rows.width, rows.dtype(dtype))

    def attend(self, cache: KVCache, q_and_gate: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Attend within one sequence; all arrays are [T, ...] of its new tokens."""
        length, weights = q_and_gate.shape[0], self.weights
        keys, values = self.room(cache, length, q_and_gate.dtype)
        y, cache.keys, cache.values = self.kernels.attention(
            AttentionInputs(q_and_gate, k, v, weights, keys, values, cache.length)
        )
        cache.length += length
        return y

    def attend_at(self, position: mx.array, caches: Sequence[mx.array], projected: Sequence[mx.array]) -> mx.array:
        """Attend from one token of each sequence to keys and values with room for it; needs ``takes_positions``."""
        q_and_gate, k, v = projected
        keys, values = caches
        return self.kernels.attention(AttentionInputs(q_and_gate, k, v, self.weights, keys, values, 0, position))[0]

    def takes_positions(self, sequences: int = 1) -> bool:
        """Return whether ``attend_at`` runs a kernel; MLX's operations need positions on the host."""
        attention, weights = self.kernels.attention, self.weights
        room = mx.zeros((sequences, weights.kv_heads, 1, weights.rows.width), weights.rows.dtype(weights.q_norm.dtype))
        row = mx.zeros((sequences, weights.heads * weights.query_width), weights.q_norm.dtype)
        inputs = AttentionInputs(row, row, row, weights, room, room, 0)
        return isinstance(attention, CheckedKernel) and attention.runs(inputs)
