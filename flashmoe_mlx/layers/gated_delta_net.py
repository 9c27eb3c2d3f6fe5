"""GatedDeltaNet: a short convolution, then the gated delta rule in place of attention.

Source: transformers ``Qwen3_5MoeGatedDeltaNet``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import DeltaBatch, DeltaInputs, DeltaWeights, Kernels
from flashmoe_mlx.layers.linear import Linear, project_all
from flashmoe_mlx.layers.recurrent_state import RecurrentState
from flashmoe_mlx.layers.sequences import by_sequence

_OPEN = 32.0
"""An input of the output gate at which SiLU multiplies by exactly 32 in f32."""


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
    sigmoid_gate: bool = False
    """Whether the output gate is a sigmoid rather than SiLU, with which the kernels compute."""

    def __call__(
        self,
        projected: Sequence[mx.array],
        caches: Sequence[RecurrentState],
        lengths: Sequence[int],
        residual: mx.array | None,
    ) -> mx.array:
        """Apply the layer to new tokens of several sequences; arguments and result are those of ``Attention``."""
        kernel = self.kernels.gated_delta_net_batch
        if len(caches) > 1 and kernel is not None and not any(cache.keep_at for cache in caches):
            return self.out_proj(self._recur_together(kernel, projected, caches, lengths), residual)
        return self.out_proj(by_sequence(self._recur, projected, caches, lengths), residual)

    def _recur_together(
        self,
        kernel: Callable[[DeltaBatch], tuple[mx.array, ...]],
        projected: Sequence[mx.array],
        caches: Sequence[RecurrentState],
        lengths: Sequence[int],
    ) -> mx.array:
        """Continue the recurrence of each of several sequences in one call of ``kernel``."""
        qkv, z, b, a = projected
        conv_states, recurrent_states = zip(*(self._states(cache, qkv.dtype) for cache in caches), strict=True)
        before = conv_states, recurrent_states
        y, *arrays = kernel(DeltaBatch(qkv, self._gate(z), b, a, self.weights, *before, list(lengths)))
        for cache, states in zip(caches, zip(arrays[::2], arrays[1::2], strict=True), strict=True):
            cache.conv_state, cache.recurrent_state = states
        return self._gated(y, z)

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
        if not cache.keep_at:
            states = self._states(cache, projected[0].dtype)
            y, cache.conv_state, cache.recurrent_state = self.recur(projected, *states)
            return y
        pieces, start, tokens = [], 0, len(projected[0])
        keep_here = [end for end in cache.keep_at if end <= tokens]
        for end in dict.fromkeys((*keep_here, tokens)):
            rows = [array[start:end] for array in projected]
            states = self._states(cache, projected[0].dtype)
            y, cache.conv_state, cache.recurrent_state = self.recur(rows, *states)
            pieces.append(y)
            if end in keep_here:
                # A kernel may write to its states in place, so a copy must be made before the next piece.
                cache.kept.append(cache.snapshot())
            start = end
        cache.keep_at = [end - tokens for end in cache.keep_at if end > tokens]  # a pass may come in several blocks
        return mx.concatenate(pieces)

    def _states(self, cache: RecurrentState, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Return both states of a sequence."""
        if cache.conv_state is None or cache.recurrent_state is None:
            return self.weights.empty(dtype)
        return cache.conv_state, cache.recurrent_state

    def recur(
        self, projected: Sequence[mx.array], conv_state: mx.array, recurrent_state: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return the output of the recurrence for ``projected``, the result of ``project``, and both new states."""
        qkv, z, b, a = projected
        inputs = DeltaInputs(qkv, self._gate(z), b, a, self.weights, conv_state, recurrent_state)
        y, *states = self.kernels.gated_delta_net(inputs)
        return self._gated(y, z), states[0], states[1]

    def _gate(self, z: mx.array) -> mx.array:
        """Return the input of the kernel's SiLU for ``z``, the input of the output gate."""
        return mx.full(z.shape, _OPEN, z.dtype) if self.sigmoid_gate else z

    def _gated(self, y: mx.array, z: mx.array) -> mx.array:
        """Apply to ``y``, the result of a kernel, the output gate that the kernel did not apply."""
        if not self.sigmoid_gate:
            return y
        return (y * (mx.sigmoid(z.astype(mx.float32)) / _OPEN)).astype(y.dtype)
