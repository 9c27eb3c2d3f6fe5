"""Routed experts one by one, by MLX or by the reference."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import ExpertWeights, QuantizedWeight
from flashmoe_mlx.formats.components import record_views
from flashmoe_mlx.formats.record import RecordLayout
from flashmoe_mlx.moe.groups import ExpertGroups
from flashmoe_mlx.moe.router import Routing
from flashmoe_mlx.moe.shared_expert import SharedExpert, begin_shared


@dataclass(frozen=True, slots=True)
class ExpertsOneByOne:
    """A strategy that applies each expert to all of its tokens, in ascending order, lazily.

    Attributes:
        mlp: as ``expert_mlp.reference.expert_mlp``.
        layout: the layout of the records, quantized or dense.
    """

    mlp: Callable[[mx.array, ExpertWeights], mx.array]
    layout: RecordLayout

    def __call__(
        self, x: mx.array, residual: mx.array, routing: Routing, shared: SharedExpert | None, groups: ExpertGroups
    ) -> mx.array:
        """Add routed and shared experts to ``residual``; see ``RoutedExperts``."""
        apart = begin_shared(shared, x, routing, groups.clock)
        y = mx.zeros(x.shape, mx.float32)
        for group in groups:
            for expert, record in zip(group.experts, group.batch.records, strict=True):
                y = self._add(y, x, expert, expert_weights(record, self.layout), routing)
            group.finish(y)
        y = groups.joined(y).astype(x.dtype)
        return residual + (y if apart is None else y + apart)

    def _add(self, y: mx.array, x: mx.array, expert: int, weights: ExpertWeights, routing: Routing) -> mx.array:
        tokens, ranks = np.nonzero(routing.experts == expert)
        if len(x) == 1:
            return y + routing.weights[0, int(ranks[0])] * self.mlp(x, weights)
        rows, columns = mx.array(tokens), mx.array(ranks)
        out = self.mlp(x[rows], weights)
        return y.at[rows].add(routing.weights[rows, columns][:, None] * out)


def expert_weights(record: mx.array, layout: RecordLayout) -> ExpertWeights:
    """Return the matrices inside ``record``, uint8 [record bytes], as views."""
    parts = record_views(record, layout)

    def weight(projection: str) -> QuantizedWeight:
        form = layout.format_of(projection)
        return QuantizedWeight(
            parts[f"{projection}.weight"],
            parts.get(f"{projection}.scales"),
            parts.get(f"{projection}.biases"),
            form.bits,
            form.group_size,
            mode=form.mode,
        )

    return ExpertWeights(weight("gate"), weight("up"), weight("down"))
