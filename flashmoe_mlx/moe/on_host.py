"""Routed experts by a kernel for CPUs, which reads records in the CPU's memory."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import ExpertFormat
from flashmoe_mlx.moe.groups import ExpertGroups
from flashmoe_mlx.moe.router import Routing
from flashmoe_mlx.moe.shared_expert import SharedExpert


@dataclass(frozen=True, slots=True)
class ExpertsOnHost:
    """A strategy that applies all experts of any number of tokens in one call per group, without delay.

    Experts are added to the residual one by one in ascending order, and a fused shared expert last. A token's sum
    therefore depends neither on the number of slots nor on the other tokens.

    Attributes:
        kernel: as ``routed_experts.cpu.routed_experts``.
        form: the format of the records.
        fuse_shared: whether ``kernel`` also applies the shared expert.
    """

    kernel: Callable[..., mx.array]
    form: ExpertFormat
    fuse_shared: bool

    def __call__(
        self, x: mx.array, residual: mx.array, routing: Routing, shared: SharedExpert, groups: ExpertGroups
    ) -> mx.array:
        """Add routed and shared experts to ``residual``; see ``RoutedExperts``."""
        y = residual if self.fuse_shared else residual + shared(x, routing.shared_weight)
        in_place = not self.fuse_shared  # ``residual`` itself belongs to the caller
        for group in groups:
            fuse = self.fuse_shared and group.is_last
            weights = routing.all_weights if fuse else routing.weights
            rows = mx.array(group.rows(range(len(group.experts))))
            with group.clock.computing("experts"):
                own = shared.weights if fuse else None
                y = self.kernel(x, group.batch.host, rows, weights, self.form, own, y, in_place=in_place)
            in_place = True
        return y
