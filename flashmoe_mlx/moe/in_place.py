"""Routed experts of a few tokens by a kernel for GPUs, which reads records in the slots of the store."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import ExpertFormat
from flashmoe_mlx.moe.groups import ExpertGroups
from flashmoe_mlx.moe.router import Routing
from flashmoe_mlx.moe.shared_expert import SharedExpert, begin_shared


@dataclass(frozen=True, slots=True)
class ExpertsInPlace:
    """A strategy that applies all experts of a group in one call, lazily.

    Attributes:
        kernel: as ``routed_experts.reference.routed_experts``.
        form: the format of the records.
        fuse_shared: whether ``kernel`` also applies the shared expert.
    """

    kernel: Callable[..., mx.array]
    form: ExpertFormat
    fuse_shared: bool

    def __call__(
        self, x: mx.array, residual: mx.array, routing: Routing, shared: SharedExpert | None, groups: ExpertGroups
    ) -> mx.array:
        """Add routed and shared experts to ``residual``; see ``RoutedExperts``."""
        apart = None if self.fuse_shared else begin_shared(shared, x, routing, groups.clock)
        y: mx.array | None = None
        added = False
        for group in groups:
            added = y is None and group.is_last  # the kernel adds the residual, unless further groups are to be added
            own = shared.weights if shared is not None and self.fuse_shared and y is None else None
            weights = routing.weights if own is None else routing.all_weights
            rows = mx.array(group.rows(group.batch.slots))
            part = self.kernel(x, group.batch.slab, rows, weights, self.form, own, residual if added else None)
            # Sums over several groups are in f32, so that they hardly depend on the number of slots.
            y = part if y is None else y.astype(mx.float32) + part
            group.finish(y)
        assert y is not None
        y = y.astype(x.dtype)
        y = y if apart is None else y + apart
        return y if added else residual + y
