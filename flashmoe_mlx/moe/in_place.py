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
        own = shared.weights if shared is not None and self.fuse_shared and groups.leads else None
        y: mx.array | None = None
        added = False
        for group in groups:
            added = y is None and group.is_last and groups.nodes is None  # the kernel adds the residual
            weights = routing.weights if own is None else routing.all_weights
            rows = mx.array(group.rows(group.batch.slots))
            # Parts of a sum are in f32: it hardly depends on the number of slots and of nodes.
            start = residual if added else mx.zeros(x.shape, mx.float32)
            part = self.kernel(x, group.batch.slab, rows, weights, self.form, own, start)
            y, own = part if y is None else y + part, None
            group.finish(y)
        assert y is not None
        y = y if added else (residual + groups.joined(y)).astype(x.dtype)
        return y if apart is None else y + apart
