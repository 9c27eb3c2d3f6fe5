"""The mixture of experts: router, routed experts from a store, shared expert.

Source: transformers ``Qwen3_5MoeSparseMoeBlock``: softmax over all experts, the K largest, renormalised.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels import ExpertFormat, ExpertWeights, Kernels, QuantizedWeight
from flashmoe_mlx.custom_kernels.expert_format import expert_format
from flashmoe_mlx.custom_kernels.routed_experts import cpu, gpu
from flashmoe_mlx.custom_kernels.routed_experts.grouped import DenseExperts, grouped_experts
from flashmoe_mlx.formats.components import record_views
from flashmoe_mlx.formats.record import RecordLayout
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.moe.router import Router, Routing
from flashmoe_mlx.stores.contract import ExpertBatch, ExpertStore


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """One layer's MoE block: router, shared expert, and the store that serves its routed experts."""

    layer: int
    kernels: Kernels
    store: ExpertStore
    router: Router
    shared: ExpertWeights

    def __call__(self, residual: mx.array, context: ForwardContext) -> mx.array:
        """Return the residual stream [T, hidden] plus the output of its experts.

        Evaluates the router's choice, reads the chosen experts, and leaves the rest lazy.
        """
        clock, prefetcher = context.clock, context.prefetcher
        form = expert_format(self.store.layout)
        with clock.computing("experts"):
            x = self.router.normalize(residual)
        guess = None if prefetcher is None else prefetcher.guess(self.layer, residual)
        routing = self.router.route(x, clock, *(() if guess is None else (guess,)))
        indices = routing.experts
        if context.observer is not None:
            context.observer(self.layer, indices)

        def fetched() -> None:  # the experts of this layer are there, and nothing was computed with the last of them
            if prefetcher is not None:
                with clock.phase("io"):
                    prefetcher.chosen(self.layer, indices, guess)

        if form is not None and self.kernels.on_host is not None:
            return self._on_host(x, residual, routing, form, clock, fetched)
        y = self._combined(x, indices, routing.weights, routing.shared_weight, form, clock)
        fetched()
        return residual + y

    def with_store(self, store: ExpertStore, experts_k: int) -> "MixtureOfExperts":
        """Return this block with ``experts_k`` routed experts for each token, served by ``store``."""
        return replace(self, store=store, router=replace(self.router, experts_k=experts_k))

    def _combined(
        self,
        x: mx.array,
        indices: npt.NDArray[np.uint32],
        weights: mx.array,
        shared_share: mx.array,
        form: ExpertFormat | None,
        clock: PhaseClock,
    ) -> mx.array:
        if form is not None and self.kernels.takes_routed(len(x), form, x.dtype):
            return self._in_place(x, indices, weights, shared_share, form, clock)
        if form is not None and self.kernels.dense_experts is not None:
            y = self._grouped(x, indices, weights, form, self.kernels.dense_experts, clock)
        else:
            y = self._by_expert(x, indices, weights, clock)
        return y + shared_share * self.kernels.expert_mlp(x, self.shared)

    def _on_host(
        self,
        x: mx.array,
        residual: mx.array,
        routing: Routing,
        form: ExpertFormat,
        clock: PhaseClock,
        fetched: Callable[[], None],
    ) -> mx.array:
        """All experts of any number of tokens, from where the CPU sees them; computes at once."""
        assert self.kernels.on_host is not None
        joined = cpu.can_fuse_shared_expert(self.shared)
        chosen = routing.experts
        y = residual if joined else residual + routing.shared_weight * self.kernels.expert_mlp(x, self.shared)
        shared, weights = None, routing.weights
        groups = list(self._groups(chosen))
        for group in groups:
            batch = self._fetch(group, clock)
            if group is groups[-1]:
                fetched()
                if joined:  # last, so that sums do not depend on the number of slots
                    shared, weights = self.shared, routing.all_weights
            rows = np.full(int(chosen.max()) + 1, -1, np.int32)
            rows[group] = np.arange(len(group))
            with clock.computing("experts"):
                y = self.kernels.on_host(x, batch.host, mx.array(rows[chosen]), weights, form, shared, y)
        return y

    def _in_place(
        self,
        x: mx.array,
        chosen: npt.NDArray[np.uint32],
        weights: mx.array,
        shared_share: mx.array,
        form: ExpertFormat,
        clock: PhaseClock,
    ) -> mx.array:
        """All experts of a few tokens at once, from the store's slab."""
        shared = self.shared if gpu.can_fuse_shared_expert(self.shared, form) else None
        shares = weights if shared is None else mx.concatenate([weights, shared_share.astype(mx.float32)], axis=-1)
        y: mx.array | None = None
        for group in self._groups(chosen):
            if y is not None:
                clock.evaluate("experts", y)  # the slots are about to be refilled
            batch = self._fetch(group, clock)
            rows = mx.array(_rows(chosen, group, batch))
            part = self.kernels.routed_experts(x, batch.slab, rows, shares, form, shared)
            # Over several groups in f32, so that the sum hardly depends on the number of slots.
            y = part if y is None else y.astype(mx.float32) + part
            shared, shares = None, weights
        assert y is not None
        y = y.astype(x.dtype)
        if gpu.can_fuse_shared_expert(self.shared, form):
            return y
        return y + shared_share * self.kernels.expert_mlp(x, self.shared)

    def _grouped(
        self,
        x: mx.array,
        chosen: npt.NDArray[np.uint32],
        weights: mx.array,
        form: ExpertFormat,
        dense_experts: DenseExperts,
        clock: PhaseClock,
    ) -> mx.array:
        """Every distinct expert is fetched once and applied to all of its tokens, several experts at a time."""
        y = mx.zeros(x.shape, mx.float32)
        for number, group in enumerate(self._groups(chosen)):
            if number:
                clock.evaluate("experts", y)  # the slots are about to be refilled
            batch = self._fetch(group, clock)
            y = y + grouped_experts(x, batch.slab, _rows(chosen, group, batch), weights, form, dense_experts)
        return y.astype(x.dtype)

    def _by_expert(self, x: mx.array, chosen: npt.NDArray[np.uint32], weights: mx.array, clock: PhaseClock) -> mx.array:
        """Every distinct expert is fetched once and applied to all of its tokens, in ascending order."""
        y = mx.zeros(x.shape, mx.float32)
        for number, group in enumerate(self._groups(chosen)):
            if number:
                clock.evaluate("experts", y)  # the slots are about to be refilled
            batch = self._fetch(group, clock)
            for expert, record in zip(group, batch.records, strict=True):
                y = self._add(y, x, expert, expert_weights(record, self.store.layout), chosen, weights)
        return y.astype(x.dtype)

    def _groups(self, chosen: npt.NDArray[np.uint32]) -> Iterator[list[int]]:
        """The distinct experts in ascending order, as many at a time as the store has slots."""
        distinct = sorted(set(chosen.ravel().tolist()))
        for start in range(0, len(distinct), self.store.slots):
            yield distinct[start : start + self.store.slots]

    def _fetch(self, group: list[int], clock: PhaseClock) -> ExpertBatch:
        with clock.phase("io"):
            return self.store.fetch(self.layer, group)

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


def _rows(chosen: npt.NDArray[np.uint32], group: Sequence[int], batch: ExpertBatch) -> npt.NDArray[np.int32]:
    """The row of the batch's slab that holds each choice; -1 if it is not of this group."""
    rows = np.full(int(chosen.max()) + 1, -1, np.int32)
    rows[group] = batch.slots
    return rows[chosen]


def expert_weights(record: mx.array, layout: RecordLayout) -> ExpertWeights:
    """The matrices inside a record, uint8 [record bytes], as views."""
    parts = record_views(record, layout)

    def weight(projection: str) -> QuantizedWeight:
        return QuantizedWeight(
            parts[f"{projection}.weight"],
            parts.get(f"{projection}.scales"),
            parts.get(f"{projection}.biases"),
            layout.bits,
            layout.group_size,
        )

    return ExpertWeights(weight("gate"), weight("up"), weight("down"))
