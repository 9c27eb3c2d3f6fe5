"""The router: the choice of experts for each token, and their routing weights.

Sources: transformers ``Qwen3_5MoeTopKRouter`` and ``Qwen3MoeTopKRouter``: softmax over all experts, the K largest, in
most models renormalized.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels import ChooseExperts, NormedMatvec
from flashmoe_mlx.layers.linear import Linear, project_all
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.layers.sequences import BLOCK


@dataclass(frozen=True, slots=True)
class Routing:
    """The experts of T tokens and their routing weights.

    Attributes:
        experts: [T, K], ascending for each token, so that a token's sum does not depend on its prompt's chunks.
        all_weights: f32, ``weights`` [T, K], or [T, K + 1] with the weight of a shared expert at the end.
        dtype: the type of activations.
    """

    experts: npt.NDArray[np.uint32]
    all_weights: mx.array
    dtype: mx.Dtype

    @property
    def weights(self) -> mx.array:
        """The weights of routed experts, f32 [T, K]."""
        return self.all_weights[:, : self.experts.shape[1]]

    @property
    def shared_weight(self) -> mx.array:
        """The weight of the shared expert, which must exist, [T, 1] in the type of activations."""
        return self.all_weights[:, -1:].astype(self.dtype)


@dataclass(frozen=True, slots=True)
class Router:
    """One layer's router, with the norm before it and the gate of a shared expert.

    Attributes:
        gate: scores [T, experts] of normalized hidden states.
        norm: factors [hidden] of the norm before the MoE block; None if the layer applies the norm.
        eps: the epsilon of that norm.
        experts_k: routed experts for each token.
        shared_gate: the logit of the shared expert's weight; None without a shared expert.
        rms_norm: an implementation of the norm.
        joint: ``gate`` and ``shared_gate`` as one matrix with rows of zeros below, whose product ``choose_experts``
            takes; None for the two products, and elementary operations.
        choose_experts: see ``Kernels.choose_experts``; only with ``joint``.
        normed_matvec: see ``Kernels.normed_matvec``; only with ``joint``.
        by_numpy: whether NumPy chooses. Kernels for CPUs have computed the scores already, and MLX needs longer to pass
            a further operation to a thread than for the operation.
        renormalized: whether the weights of a token's experts sum to 1.
    """

    gate: Linear
    norm: mx.array | None
    eps: float
    experts_k: int
    shared_gate: Linear | None
    rms_norm: Callable[[mx.array, mx.array, float], mx.array] = mx.fast.rms_norm
    joint: Linear | None = None
    choose_experts: ChooseExperts | None = None
    normed_matvec: NormedMatvec | None = None
    by_numpy: bool = False
    renormalized: bool = True

    @property
    def gates(self) -> tuple[Linear, ...]:
        """The matrices whose products decide the routing."""
        return (self.gate,) if self.shared_gate is None else (self.gate, self.shared_gate)

    def normalize(self, residual: mx.array) -> mx.array:
        """Normalize the residual stream [T, hidden], as the MoE block does before it routes."""
        if self.norm is None:
            return residual
        return self.rms_norm(residual, self.norm, self.eps)

    def normalize_and_score(self, residual: mx.array) -> tuple[mx.array, mx.array | None]:
        """Return ``normalize(residual)``, and its product with ``joint``; None without ``joint``."""
        if self.joint is not None and self.normed_matvec is not None and self.norm is not None and len(residual) == 1:
            scores, x = self.joint.after_norm(residual, self.norm, self.eps, self.normed_matvec)
            return x, scores
        x = self.normalize(residual)
        return x, None if self.joint is None else self.joint(x)

    def scores(self, residual: mx.array) -> mx.array:
        """Compute the scores f32 [T, experts] that this router would give the residual stream [T, hidden]."""
        return self.gate(self.normalize(residual)).astype(mx.float32)

    def route(self, x: mx.array, scores: mx.array | None, clock: PhaseClock, *also: mx.array) -> Routing:
        """Choose experts, and wait for the choice alone; the weights and ``also`` are then under way.

        The tokens are divided into blocks, because the scores of all experts take more memory than the choice.

        Args:
            x: normalized hidden states [T, hidden].
            scores: the second result of ``normalize_and_score``.
            clock: measures the wait.
            also: further arrays to begin.
        """
        rows = [slice(start, start + BLOCK) for start in range(0, len(x), BLOCK)]
        parts = [self._route(x[at], None if scores is None else scores[at], clock, *also) for at in rows]
        if len(parts) == 1:
            return parts[0]
        weights = mx.concatenate([part.all_weights for part in parts])
        return Routing(np.concatenate([part.experts for part in parts]), weights, x.dtype)

    def _route(self, x: mx.array, scores: mx.array | None, clock: PhaseClock, *also: mx.array) -> Routing:
        """Choose experts for at most ``BLOCK`` tokens; see ``route``."""
        if self.by_numpy:
            with clock.computing("router_wait"):
                clock.waits += 1
                experts, all_weights = self.choose_on_host(x)
                mx.eval(*also)
            return Routing(experts, mx.array(all_weights), x.dtype)
        chosen, _, weights = self.choose_rows(x, scores, _everyone(self.gate.weight.shape[0]))
        experts = clock.read("router_wait", chosen, weights, *also)
        return Routing(experts.astype(np.uint32), weights, x.dtype)

    def choose_rows(self, x: mx.array, scores: mx.array | None, table: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Choose experts lazily.

        Args:
            x: normalized hidden states [T, hidden].
            scores: the second result of ``normalize_and_score``.
            table: int32 [experts], the row of a slab for each expert.

        Returns:
            The experts [T, K], ascending for each token, their rows [T, K], and the ``all_weights`` of ``Routing``.
        """
        if scores is not None and self.choose_experts is not None:
            return self.choose_experts(scores, table, self.experts_k, self.shared_gate is not None, self.renormalized)
        chosen, weights = self.choose(x)
        if self.shared_gate is None:
            return chosen, table[chosen], weights
        shared = mx.sigmoid(self.shared_gate(x)).astype(mx.float32)
        return chosen, table[chosen], mx.concatenate([weights, shared], axis=-1)

    def choose(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Choose experts lazily by elementary operations: uint32 [T, K] and their weights, f32 [T, K]."""
        scores = mx.softmax(self.gate(x).astype(mx.float32), axis=-1)
        chosen = mx.sort(mx.argpartition(-scores, self.experts_k - 1, axis=-1)[:, : self.experts_k], axis=-1)
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        return chosen, weights / weights.sum(-1, keepdims=True) if self.renormalized else weights

    def choose_on_host(self, x: mx.array) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
        """Choose experts without delay: [T, K], and the ``all_weights`` of ``Routing``."""
        scores, *shared = (np.array(logits, np.float32) for logits in project_all(self.gates, x))
        chosen = np.sort(np.argpartition(-scores, self.experts_k - 1, axis=-1)[:, : self.experts_k], axis=-1)
        weights = np.take_along_axis(scores, chosen, axis=-1)
        highest = weights.max(-1, keepdims=True)
        weights = np.exp(weights - highest)
        weights /= (weights if self.renormalized else np.exp(scores - highest)).sum(-1, keepdims=True)
        shared_weight = [np.exp(-np.logaddexp(0, -logit)) for logit in shared]  # the sigmoid, without overflow
        return chosen.astype(np.uint32), np.concatenate([weights, *shared_weight], axis=-1)


@cache
def _everyone(experts: int) -> mx.array:
    numbers = mx.arange(experts, dtype=mx.int32)
    mx.eval(numbers)  # no other thread can evaluate a lazy array
    return numbers
