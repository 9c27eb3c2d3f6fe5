"""Routed experts by a kernel for CPUs, which reads records in the CPU's memory."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import ExpertFormat, ExpertWeights, native
from flashmoe_mlx.custom_kernels.checks import CheckedKernel
from flashmoe_mlx.custom_kernels.routed_experts.cpu import ExpertOutputs
from flashmoe_mlx.moe.groups import ExpertGroup, ExpertGroups
from flashmoe_mlx.moe.router import Routing
from flashmoe_mlx.moe.shared_expert import SharedExpert


@dataclass(frozen=True, slots=True)
class ExpertsOnHost:
    """A strategy that applies all experts of any number of tokens in one call per group, without delay.

    Experts are added to the residual one by one in ascending order, and a fused shared expert last. A token's sum
    therefore depends neither on the number of slots nor on the other tokens. Experts of a few tokens that fit into one
    group are applied as they arrive, while others are read; their sum is the same to the last bit.

    Attributes:
        kernel: as ``routed_experts.cpu.routed_experts``.
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
        leads = groups.leads
        if not leads:
            residual, shared = mx.zeros_like(residual), None
        apart = None if self.fuse_shared else shared
        y = residual if apart is None else residual + apart(x, routing.shared_weight)
        fused = shared.weights if shared is not None and self.fuse_shared else None
        if self._applies_parts(x, routing, fused, groups):
            return groups.joined(self._in_parts(x, y, routing, fused, groups))
        in_place = apart is not None or not leads  # ``residual`` of the caller stays as it is
        for group in groups:
            y = self._apply(x, y, routing, fused if group.is_last else None, group, in_place)
            in_place = True
        return groups.joined(y)

    def _apply(
        self,
        x: mx.array,
        y: mx.array,
        routing: Routing,
        fused: ExpertWeights | None,
        group: ExpertGroup,
        in_place: bool = False,
    ) -> mx.array:
        weights = routing.weights if fused is None else routing.all_weights
        rows = mx.array(group.rows(range(len(group.experts))))
        with group.clock.computing("experts"):
            return self.kernel(x, group.batch.host, rows, weights, self.form, fused, y, in_place=in_place)

    def _applies_parts(self, x: mx.array, routing: Routing, fused: ExpertWeights | None, groups: ExpertGroups) -> bool:
        """Return whether experts arrive over time and can be applied so: by the extension, which passed its check."""
        kernel = self.kernel
        if not groups.store.reads or len(x) > native.few_tokens() or not groups.fit:
            return False
        if not isinstance(kernel, CheckedKernel):
            return False
        weights = routing.weights if fused is None else routing.all_weights
        return kernel.runs(x, [], mx.array(routing.experts), weights, self.form, fused, x, in_parts=True)

    def _in_parts(
        self, x: mx.array, y: mx.array, routing: Routing, fused: ExpertWeights | None, groups: ExpertGroups
    ) -> mx.array:
        outputs: ExpertOutputs | None = None
        at_once: mx.array | None = None

        def arrived(part: ExpertGroup) -> None:
            nonlocal outputs, at_once
            if part.is_last and outputs is None and list(part.experts) == sorted(part.experts):
                at_once = self._apply(x, y, routing, fused, part)
                return
            with part.clock.computing("experts"):
                if outputs is None:
                    outputs = ExpertOutputs(x, routing.experts.shape[1], self.form, fused)
                outputs.compute(part.batch.host, part.rows(range(len(part.experts))))

        groups.fetch_in_parts(arrived)
        if at_once is not None:
            return at_once
        assert outputs is not None
        with groups.clock.computing("experts"):
            return outputs.sum(routing.weights if fused is None else routing.all_weights, y)
