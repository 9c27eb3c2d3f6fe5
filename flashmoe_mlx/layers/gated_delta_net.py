"""GatedDeltaNet: a short convolution, then the gated delta rule in place of attention.

Source: transformers ``Qwen3_5MoeGatedDeltaNet``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import DeltaInputs, DeltaWeights, Kernels
from flashmoe_mlx.layers.linear import Linear, project_all
from flashmoe_mlx.layers.recurrent_state import RecurrentState
from flashmoe_mlx.layers.sequences import by_sequence


@dataclass(frozen=True, slots=True)
class GatedDeltaNet:
    """The weights of one layer."""

    weights: DeltaWeights
    kernels: Kernels
    in_proj_qkv: Linear
    in_proj_z: Linear
    in_proj_b: Linear
    in_proj_a: Linear
    out_proj: Linear
    joint: Linear | None = None
    """The first four projections as one matrix, for one token; see ``layers.linear.join``."""

    def __call__(
        self,
        projected: Sequence[mx.array],
        caches: Sequence[RecurrentState],
        lengths: Sequence[int],
        residual: mx.array,
    ) -> mx.array:
        """Apply the layer to new tokens of several sequences; arguments and result are those of ``Attention``."""
        return self.out_proj(by_sequence(self._recur, projected, caches, lengths), residual)

    def project(self, x: mx.array) -> tuple[mx.array, ...]:
        """Compute the four inputs of the recurrence, each [T, ...], of ``x`` [T, hidden]."""
        return project_all(self.projections, x)

    @property
    def projections(self) -> tuple[Linear, ...]:
        """The matrices of ``project``."""
        return self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a

    def new_cache(self) -> RecurrentState:
        """Return the state of a sequence without tokens."""
        return RecurrentState()

    def _recur(self, cache: RecurrentState, *projected: mx.array) -> mx.array:
        """Continue the recurrence of one sequence; all arrays are [T, ...] of its new tokens."""
        if cache.conv_state is None or cache.recurrent_state is None:
            cache.conv_state, cache.recurrent_state = self.weights.empty(projected[0].dtype)
        if not cache.keep_at:
            y, cache.conv_state, cache.recurrent_state = self.recur(projected, cache.conv_state, cache.recurrent_state)
            return y
        pieces, start, tokens = [], 0, len(projected[0])
        for end in (*cache.keep_at, *(() if cache.keep_at[-1] == tokens else (tokens,))):
            rows = [array[start:end] for array in projected]
            y, cache.conv_state, cache.recurrent_state = self.recur(rows, cache.conv_state, cache.recurrent_state)
            pieces.append(y)
            if end in cache.keep_at:
                # A kernel may write to its states in place, so a copy must be made before the next piece.
                cache.kept.append(cache.snapshot())
            start = end
        return mx.concatenate(pieces)

    def recur(
        self, projected: Sequence[mx.array], conv_state: mx.array, recurrent_state: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return the output of the recurrence for ``projected``, the result of ``project``, and both new states."""
        qkv, z, b, a = projected
        return self.kernels.gated_delta_net(DeltaInputs(qkv, z, b, a, self.weights, conv_state, recurrent_state))
