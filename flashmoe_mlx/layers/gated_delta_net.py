"""GatedDeltaNet: a short convolution, then the gated delta rule in place of attention.

Source: transformers ``Qwen3_5MoeGatedDeltaNet``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import DeltaInputs, DeltaWeights, Kernels
from flashmoe_mlx.layers.cache import RecurrentState
from flashmoe_mlx.layers.linear import Linear, project_all
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

    def __call__(
        self, x: mx.array, caches: Sequence[RecurrentState], lengths: Sequence[int], residual: mx.array
    ) -> mx.array:
        """Apply the layer to new tokens of several sequences; arguments and result as of ``Attention``."""
        projected = project_all((self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a), x)
        return self.out_proj(by_sequence(self._recur, projected, caches, lengths), residual)

    def new_cache(self) -> RecurrentState:
        """Return the state of a sequence without tokens."""
        return RecurrentState()

    def _recur(self, cache: RecurrentState, qkv: mx.array, z: mx.array, b: mx.array, a: mx.array) -> mx.array:
        """Continue the recurrence of one sequence; all arrays are [T, ...] of its new tokens."""
        if cache.conv_state is None or cache.recurrent_state is None:
            cache.conv_state, cache.recurrent_state = self.weights.empty(qkv.dtype)
        y, cache.conv_state, cache.recurrent_state = self.kernels.gated_delta_net(
            DeltaInputs(qkv, z, b, a, self.weights, cache.conv_state, cache.recurrent_state)
        )
        return y
