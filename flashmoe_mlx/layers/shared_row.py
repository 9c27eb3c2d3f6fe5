"""The place of one sequence in arrays that several sequences share."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.layers.kv_cache import rounded_up
from flashmoe_mlx.layers.recurrent_state import lazy_copy

Pair = tuple[mx.array, mx.array]


@dataclass(slots=True)
class SharedRow:
    """The contents of a sequence's caches as a row of arrays [sequences, ...].

    Not frozen: every step makes one for each sequence.

    Attributes:
        tokens: keys and values [sequences, kv heads, capacity, width] of every layer that keeps tokens, by the index of
            the layer. Kernels write to them in place.
        row: the row of the sequence in ``tokens``.
        states: both states of every other layer, by the index of the layer. No kernel writes to them.
        state_row: the row of the sequence in ``states``.
        written: a result of the kernels that wrote the latest tokens; None if they have ended. MLX does not know that
            they write, so what reads ``tokens`` must wait for it.
    """

    tokens: dict[int, Pair]
    row: int
    states: Mapping[int, Pair]
    state_row: int
    written: mx.array | None = None

    def is_beside(self, other: "SharedRow | None") -> bool:
        """Return whether ``other`` is a row of the same arrays."""
        return other is not None and other.tokens is self.tokens and other.states is self.states

    def with_states_of(self, other: "SharedRow") -> "SharedRow":
        """Return the row with the states of ``other``, an earlier row of the same sequence."""
        return SharedRow(self.tokens, self.row, other.states, other.state_row, self.written)

    def state(self, layer: int) -> Pair:
        """Return the states of the sequence in ``layer`` as separate arrays."""
        conv_state, recurrent_state = self.states[layer]
        row = self.state_row
        own = lazy_copy(conv_state[row]), lazy_copy(recurrent_state[row : row + 1])
        mx.eval(own)
        return own

    def copies(self, length: int) -> list[Pair]:
        """Return lazy copies of the contents of every layer, with the capacity that ``length`` tokens need."""
        capacity = rounded_up(length)
        own: dict[int, Pair] = {}
        for layer, (keys, values) in self.tokens.items():
            row = slice(self.row, self.row + 1)
            own[layer] = lazy_copy(keys[row, :, :capacity]), lazy_copy(values[row, :, :capacity])
        for layer, (conv_state, recurrent_state) in self.states.items():
            row = slice(self.state_row, self.state_row + 1)
            own[layer] = lazy_copy(conv_state[self.state_row]), lazy_copy(recurrent_state[row])
        return [own[layer] for layer in range(len(own))]
