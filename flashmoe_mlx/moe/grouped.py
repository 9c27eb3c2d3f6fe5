"""Routed experts of many tokens on a GPU, as dense matrices."""

from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import ExpertFormat
from flashmoe_mlx.custom_kernels.routed_experts.grouped import DenseExperts, RowKernels, grouped_experts
from flashmoe_mlx.moe.groups import ExpertGroups
from flashmoe_mlx.moe.router import Routing
from flashmoe_mlx.moe.shared_expert import SharedExpert, begin_shared


@dataclass(frozen=True, slots=True)
class ExpertsGrouped:
    """A strategy that dequantizes several experts at a time and applies each to all of its tokens, lazily.

    Attributes:
        dense_experts: as ``dense_experts.reference.dense_experts``.
        row_kernels: gather tokens and add outputs.
        form: the format of the records.
    """

    dense_experts: DenseExperts
    row_kernels: RowKernels
    form: ExpertFormat

    def __call__(
        self, x: mx.array, residual: mx.array, routing: Routing, shared: SharedExpert | None, groups: ExpertGroups
    ) -> mx.array:
        """Add routed and shared experts to ``residual``; see ``RoutedExperts``."""
        apart = begin_shared(shared, x, routing, groups.clock)
        y = mx.zeros(x.shape, mx.float32)
        for group in groups:
            rows = group.rows(group.batch.slots)
            y = y + grouped_experts(
                x, group.batch.slab, rows, routing.weights, self.form, self.dense_experts, self.row_kernels
            )
            group.finish(y)
        y = groups.joined(y).astype(x.dtype)
        return residual + (y if apart is None else y + apart)
