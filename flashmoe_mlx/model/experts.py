"""The mixture of experts: router, routed experts from a store, shared expert.

Source: transformers ``Qwen3_5MoeSparseMoeBlock``: softmax over all experts, the K largest, renormalised.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels import Kernels
from flashmoe_mlx.custom_kernels.expert_mlp import ExpertWeights, Weight
from flashmoe_mlx.expert_store import ExpertStore
from flashmoe_mlx.model.linear import Linear, swiglu
from flashmoe_mlx.model.phases import PhaseClock
from flashmoe_mlx.pack.quantise import record_views
from flashmoe_mlx.pack.record import RecordLayout


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """One layer's resident weights and the store with the others."""

    layer: int
    experts_k: int
    kernels: Kernels
    store: ExpertStore
    gate: Linear
    shared_gate_proj: Linear
    shared_up_proj: Linear
    shared_down_proj: Linear
    shared_expert_gate: Linear

    def __call__(self, x: mx.array, clock: PhaseClock) -> mx.array:
        """[T, hidden] -> [T, hidden]; evaluates the router's choice, reads those experts, and leaves the rest lazy."""
        chosen, weights = self.route(x)
        clock.evaluate("router_wait", chosen, weights)
        y = self._routed(x, np.array(chosen), weights, clock)
        shared = swiglu(x, self.shared_gate_proj, self.shared_up_proj, self.shared_down_proj)
        return y + mx.sigmoid(self.shared_expert_gate(x)) * shared

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The experts of each token, int [T, K], and their weights, f32 [T, K], which sum to 1."""
        scores = mx.softmax(self.gate(x).astype(mx.float32), axis=-1)
        chosen = mx.argpartition(-scores, self.experts_k - 1, axis=-1)[:, : self.experts_k]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        return chosen, weights / weights.sum(-1, keepdims=True)

    def _routed(self, x: mx.array, chosen: npt.NDArray[np.uint32], weights: mx.array, clock: PhaseClock) -> mx.array:
        """Every distinct expert is fetched once and applied to all of its tokens, in ascending order.

        The order makes the sum of a token independent of how its prompt was cut into chunks.
        """
        distinct = np.unique(chosen).tolist()
        y = mx.zeros(x.shape, mx.float32)
        for start in range(0, len(distinct), self.store.slots):
            if start:
                clock.evaluate("experts", y)  # the slots are about to be refilled
            group = distinct[start : start + self.store.slots]
            with clock.phase("io"):
                batch = self.store.fetch(self.layer, group)
            for expert, record in zip(group, batch.records, strict=True):
                y = self._add(y, x, expert, expert_weights(record, self.store.layout), chosen, weights)
        return y.astype(x.dtype)

    def _add(
        self,
        y: mx.array,
        x: mx.array,
        expert: int,
        weight: ExpertWeights,
        chosen: npt.NDArray[np.uint32],
        weights: mx.array,
    ) -> mx.array:
        tokens, ranks = np.nonzero(chosen == expert)
        if len(x) == 1:
            return y + weights[0, int(ranks[0])] * self.kernels.expert_mlp(x, weight)
        rows, columns = mx.array(tokens), mx.array(ranks)
        out = self.kernels.expert_mlp(x[rows], weight)
        return y.at[rows].add(weights[rows, columns][:, None] * out)


def expert_weights(record: mx.array, layout: RecordLayout) -> ExpertWeights:
    """The matrices inside a record, uint8 [record bytes], as views."""
    parts = record_views(record, layout)

    def weight(projection: str) -> Weight:
        return Weight(
            parts[f"{projection}.weight"],
            parts.get(f"{projection}.scales"),
            parts.get(f"{projection}.biases"),
            layout.bits,
            layout.group_size,
        )

    return ExpertWeights(weight("gate"), weight("up"), weight("down"))
