"""Attention of several sequences, one sequence after the other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

from flashmoe_mlx.custom_kernels.attention import mlx, reference
from flashmoe_mlx.custom_kernels.attention.reference import AttentionInputs, Results
from flashmoe_mlx.custom_kernels.weights import AttentionWeights


@dataclass(slots=True)
class AttentionBatch:
    """Arguments of the operation for T tokens of several sequences, one sequence after the other.

    Attributes:
        q_and_gate: queries with their gates; see ``AttentionInputs``.
        k: keys of the T tokens, [T, kv_heads * D].
        v: values of the T tokens, [T, kv_heads * D].
        weights: weights of the layer.
        keys: the cache of keys of each sequence; see ``AttentionInputs``.
        values: the cache of values of each sequence.
        starts: the position of the first new token of each sequence.
        lengths: the number of new tokens of each sequence; their sum is T.
    """

    q_and_gate: mx.array
    k: mx.array
    v: mx.array
    weights: AttentionWeights
    keys: Sequence[mx.array]
    values: Sequence[mx.array]
    starts: list[int]
    lengths: list[int]

    def each(self) -> Iterator[AttentionInputs]:
        """Yield the arguments of each sequence."""
        ends = accumulate(self.lengths)
        for keys, values, start, length, end in zip(
            self.keys, self.values, self.starts, self.lengths, ends, strict=True
        ):
            own = slice(end - length, end)
            yield AttentionInputs(self.q_and_gate[own], self.k[own], self.v[own], self.weights, keys, values, start)


def gated_attention(
    batch: AttentionBatch, attend: Callable[[AttentionInputs], Results] = reference.gated_attention
) -> tuple[mx.array, ...]:
    """Apply ``attend`` to each sequence; return the outputs [T, heads * D], then keys and values of each sequence."""
    results = [attend(inputs) for inputs in batch.each()]
    return mx.concatenate([y for y, _, _ in results]), *(array for _, *caches in results for array in caches)


def by_mlx(batch: AttentionBatch) -> tuple[mx.array, ...]:
    """Compute ``gated_attention`` by MLX's fused operations."""
    return gated_attention(batch, mlx.gated_attention)
