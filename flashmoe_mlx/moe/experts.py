"""The mixture of experts: router, routed experts from a store, shared expert.

Source: transformers ``Qwen3_5MoeSparseMoeBlock``: softmax over all experts, the K largest, renormalised.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels import ExpertFormat, ExpertWeights, Kernels, QuantizedWeight
from flashmoe_mlx.custom_kernels.expert_format import expert_format
from flashmoe_mlx.custom_kernels.routed_experts import cpu, gpu
from flashmoe_mlx.custom_kernels.routed_experts.grouped import DenseExperts, grouped_experts
from flashmoe_mlx.formats.components import record_views
from flashmoe_mlx.formats.record import RecordLayout
from flashmoe_mlx.layers.linear import Linear, together
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.moe.prefetch import Prefetcher
from flashmoe_mlx.stores.contract import ExpertBatch, ExpertStore

RoutingObserver = Callable[[int, npt.NDArray[np.uint32]], None]
"""Told of every layer's choices: the layer, and the experts [T, K] of each token, ascending."""


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """One layer's resident weights and the store with the others."""

    layer: int
    experts_k: int
    kernels: Kernels
    store: ExpertStore
    gate: Linear
    shared: ExpertWeights
    shared_expert_gate: Linear
    observer: RoutingObserver | None = None

    def __call__(
        self, x: mx.array, residual: mx.array, clock: PhaseClock, prefetcher: Prefetcher | None = None
    ) -> mx.array:
        """[T, hidden], added to ``residual``, which is ``x`` before its norm.

        Evaluates the router's choice, reads those experts, and leaves the rest lazy.

        With a ``prefetcher`` the store is told which experts the next layer may want.
        """
        form = expert_format(self.store.layout)
        on_host = form is not None and self.kernels.on_host is not None
        guess = None if prefetcher is None else prefetcher.guess(self.layer, residual)
        wanted = () if guess is None else (guess,)
        if on_host:
            with clock.computing("router_wait"):
                indices, shares = self._routed_on_host(x)
                mx.eval(*wanted)
        else:
            chosen, weights = self.route(x)
            clock.evaluate("router_wait", chosen, weights, *wanted)
            indices = np.array(chosen)
        if self.observer is not None:
            self.observer(self.layer, indices)

        def fetched() -> None:  # the experts of this layer are there, and nothing was computed with the last of them
            if prefetcher is not None:
                with clock.phase("io"):
                    prefetcher.chosen(self.layer, indices, guess)

        if on_host:
            assert form is not None
            return self._on_host(x, residual, indices, shares, form, clock, fetched)
        y = self._combined(x, indices, weights, form, clock)
        fetched()
        return residual + y

    def _combined(
        self,
        x: mx.array,
        indices: npt.NDArray[np.uint32],
        weights: mx.array,
        form: ExpertFormat | None,
        clock: PhaseClock,
    ) -> mx.array:
        shared_share = mx.sigmoid(self.shared_expert_gate(x))
        if form is not None and self.kernels.takes_routed(len(x), form, x.dtype):
            return self._in_place(x, indices, weights, shared_share, form, clock)
        if form is not None and self.kernels.dense_experts is not None:
            y = self._grouped(x, indices, weights, form, self.kernels.dense_experts, clock)
        else:
            y = self._by_expert(x, indices, weights, clock)
        return y + shared_share * self.kernels.expert_mlp(x, self.shared)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The experts of each token, int [T, K], and their weights, f32 [T, K], which sum to 1."""
        scores = mx.softmax(self.gate(x).astype(mx.float32), axis=-1)
        # In ascending order, so that a token's sum does not depend on how its prompt was cut into chunks.
        chosen = mx.sort(mx.argpartition(-scores, self.experts_k - 1, axis=-1)[:, : self.experts_k], axis=-1)
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        return chosen, weights / weights.sum(-1, keepdims=True)

    def _routed_on_host(self, x: mx.array) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
        """As ``route``, with the shared expert's share as the last weight: [T, K + 1]. MLX starts a thread's work for
        each of these operations, which takes longer than they do.
        """
        scores, shared = (np.array(one, np.float32) for one in together((self.gate, self.shared_expert_gate), x))
        chosen = np.sort(np.argpartition(-scores, self.experts_k - 1, axis=-1)[:, : self.experts_k], axis=-1)
        weights = np.take_along_axis(scores, chosen, axis=-1)
        weights = np.exp(weights - weights.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        share = np.exp(-np.logaddexp(0, -shared))  # the sigmoid, without overflow
        return chosen.astype(np.uint32), np.concatenate([weights, share], axis=-1)

    def _on_host(
        self,
        x: mx.array,
        residual: mx.array,
        chosen: npt.NDArray[np.uint32],
        shares: npt.NDArray[np.float32],
        form: ExpertFormat,
        clock: PhaseClock,
        fetched: Callable[[], None],
    ) -> mx.array:
        """All experts of any number of tokens, from where the CPU sees them; computes at once."""
        assert self.kernels.on_host is not None
        joined = cpu.can_fuse_shared_expert(self.shared)
        y = residual if joined else residual + mx.array(shares[:, -1:]) * self.kernels.expert_mlp(x, self.shared)
        shared, weights = None, mx.array(shares[:, :-1])
        groups = list(self._groups(chosen))
        for group in groups:
            batch = self._fetch(group, clock)
            if group is groups[-1]:
                fetched()
                if joined:  # last, so that sums do not depend on the number of slots
                    shared, weights = self.shared, mx.array(shares)
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
