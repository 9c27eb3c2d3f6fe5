"""Execution strategies of routed experts, one of which is chosen when a model is built."""

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from flashmoe_mlx.custom_kernels import ExpertWeights, Kernels, native
from flashmoe_mlx.custom_kernels.expert_format import expert_format
from flashmoe_mlx.custom_kernels.routed_experts import cpu, gpu
from flashmoe_mlx.formats.record import RecordLayout
from flashmoe_mlx.moe.by_expert import ExpertsOneByOne
from flashmoe_mlx.moe.grouped import ExpertsGrouped
from flashmoe_mlx.moe.groups import ExpertGroups
from flashmoe_mlx.moe.in_memory import ExpertsInMemory
from flashmoe_mlx.moe.in_place import ExpertsInPlace
from flashmoe_mlx.moe.on_host import ExpertsOnHost
from flashmoe_mlx.moe.router import Routing
from flashmoe_mlx.moe.shared_expert import SharedExpert


class RoutedExperts(Protocol):
    """A strategy that applies the experts of one layer."""

    def __call__(
        self, x: mx.array, residual: mx.array, routing: Routing, shared: SharedExpert | None, groups: ExpertGroups
    ) -> mx.array:
        """Add routed and shared experts to ``residual``.

        A token's result does not depend on the other tokens, except for rounding in products of other shapes.

        Args:
            x: normalized hidden states [T, hidden].
            residual: the residual stream [T, hidden].
            routing: the experts of each token and their weights.
            shared: the expert that every token uses, or None.
            groups: the chosen experts, to be fetched group by group.

        Returns:
            [T, hidden] in the dtype of ``residual``.

        Raises:
            ExpertStoreError: the store failed.
        """
        ...


@dataclass(frozen=True, slots=True)
class ByTokenCount:
    """A strategy that uses ``few`` for up to ``most`` tokens, and ``many`` for more tokens."""

    most: int
    few: RoutedExperts
    many: RoutedExperts

    def __call__(
        self, x: mx.array, residual: mx.array, routing: Routing, shared: SharedExpert | None, groups: ExpertGroups
    ) -> mx.array:
        """Add routed and shared experts to ``residual``; see ``RoutedExperts``."""
        apply = self.few if len(x) <= self.most else self.many
        return apply(x, residual, routing, shared, groups)


def choose_strategy(
    kernels: Kernels, layout: RecordLayout, dtype: mx.Dtype, shared: ExpertWeights | None
) -> RoutedExperts:
    """Choose how a layer's routed experts are applied.

    Args:
        kernels: the implementations that the model runs.
        layout: the layout of the layer's records.
        dtype: the type of activations.
        shared: the layer's shared expert, which a kernel may also apply, or None.
    """
    if kernels.routed_experts_cpu is not None and (form := expert_format(layout, native.modes())) is not None:
        return ExpertsOnHost(
            kernels.routed_experts_cpu, form, shared is not None and cpu.can_fuse_shared_expert(shared)
        )
    form = expert_format(layout)
    if form is None:
        return ExpertsOneByOne(kernels.expert_mlp, layout)
    many: RoutedExperts = ExpertsOneByOne(kernels.expert_mlp, layout)
    if kernels.dense_experts is not None:
        many = ExpertsGrouped(kernels.dense_experts, kernels.row_kernels, form)
    in_memory = choose_in_memory(kernels, layout, dtype, shared)
    if in_memory is None:
        return many
    few = ExpertsInPlace(in_memory.kernel, form, in_memory.fuse_shared)
    return ByTokenCount(in_memory.most_tokens, few, many)


def choose_in_memory(
    kernels: Kernels, layout: RecordLayout, dtype: mx.Dtype, shared: ExpertWeights | None
) -> ExpertsInMemory | None:
    """Choose how experts of a layer that a store holds as a whole are applied; None where no kernel of a GPU can.

    For the arguments, see ``choose_strategy``.
    """
    form = expert_format(layout)
    if form is None or kernels.routed_experts_gpu is None or not gpu.supports(form, dtype):
        return None
    fuse_shared = shared is not None and gpu.can_fuse_shared_expert(shared, form)
    chosen = kernels.chosen_experts if fuse_shared or shared is None else None
    return ExpertsInMemory(kernels.routed_experts_gpu, chosen, form, fuse_shared, kernels.most_gpu_tokens)
