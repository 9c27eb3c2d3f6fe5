"""GatedDeltaNet for several sequences, one sequence after the other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

from flashmoe_mlx.custom_kernels.gated_delta_net import mlx, reference
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import DeltaInputs, Results
from flashmoe_mlx.custom_kernels.weights import DeltaWeights


@dataclass(slots=True)
class DeltaBatch:
    """Arguments of the operation for T tokens of several sequences, one sequence after the other.

    Attributes:
        qkv: [T, 2 key_heads * Dk + value_heads * Dv].
        z: input of the output gate, [T, value_heads * Dv].
        b: input of beta, [T, value_heads].
        a: input of the decay, [T, value_heads].
        weights: weights of the layer.
        conv_states: the last inputs of the convolution of each sequence; see ``DeltaInputs``.
        recurrent_states: the state of each sequence.
        lengths: the number of new tokens of each sequence; their sum is T.
    """

    qkv: mx.array
    z: mx.array
    b: mx.array
    a: mx.array
    weights: DeltaWeights
    conv_states: Sequence[mx.array]
    recurrent_states: Sequence[mx.array]
    lengths: list[int]

    def each(self) -> Iterator[DeltaInputs]:
        """Yield the arguments of each sequence."""
        ends = accumulate(self.lengths)
        for conv_state, recurrent_state, length, end in zip(
            self.conv_states, self.recurrent_states, self.lengths, ends, strict=True
        ):
            own = slice(end - length, end)
            yield DeltaInputs(
                self.qkv[own], self.z[own], self.b[own], self.a[own], self.weights, conv_state, recurrent_state
            )


def gated_delta_net(
    batch: DeltaBatch, recur: Callable[[DeltaInputs], Results] = reference.gated_delta_net
) -> tuple[mx.array, ...]:
    """Apply ``recur`` to each sequence; return y [T, value_heads * Dv], then both new states of each sequence."""
    results = [recur(inputs) for inputs in batch.each()]
    return mx.concatenate([y for y, _, _ in results]), *(array for _, *states in results for array in states)


def by_mlx(batch: DeltaBatch) -> tuple[mx.array, ...]:
    """Compute ``gated_delta_net`` with MLX's fused recurrence."""
    return gated_delta_net(batch, mlx.gated_delta_net)


def in_chunks(batch: DeltaBatch) -> tuple[mx.array, ...]:
    """Compute ``gated_delta_net``; many tokens in chunks where that is faster."""
    return gated_delta_net(batch, mlx.in_chunks)
