"""The MoE block of one layer.

Sources: transformers ``Qwen3_5MoeSparseMoeBlock`` and ``Qwen3MoeSparseMoeBlock``.
"""

from dataclasses import dataclass, replace

import mlx.core as mx

from flashmoe_mlx.layers.sequences import BLOCK
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.moe.groups import ExpertGroups
from flashmoe_mlx.moe.in_memory import ExpertsInMemory
from flashmoe_mlx.moe.on_nodes import ExpertsInMemoryOfNodes, ExpertsOnNodes
from flashmoe_mlx.moe.router import Router
from flashmoe_mlx.moe.shared_expert import SharedExpert
from flashmoe_mlx.moe.strategies import RoutedExperts
from flashmoe_mlx.nodes.group import Nodes
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.stores.delivery import LayerInMemory


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """One layer's MoE block: router, shared expert, and the store that serves its routed experts.

    Attributes:
        layer: index of the layer in the store, which counts layers with experts.
        place: index of the layer in the model.
        store: serves the routed experts.
        router: chooses the experts of each token.
        shared: the expert that every token uses, or None.
        strategy: applies routed and shared experts.
        in_memory: routes and applies them where the store holds the whole layer; None if no kernel can.
    """

    layer: int
    place: int
    store: ExpertStore
    router: Router
    shared: SharedExpert | None
    strategy: RoutedExperts
    in_memory: ExpertsInMemory | ExpertsInMemoryOfNodes | None = None

    def __call__(self, residual: mx.array, context: ForwardContext) -> mx.array:
        """Return the residual stream [T, hidden] plus the output of its experts.

        Without a norm in the router, ``residual`` is the input of the experts, and the output is returned alone.

        The tokens may belong to several sequences; each distinct expert is fetched once. Waits for the router's choice
        and for the store, unless the store holds the whole layer and ``context.used`` is given; the rest may stay lazy.

        Raises:
            ExpertStoreError: the store failed.
        """
        if context.used is not None:
            whole = self.whole_layer(len(residual))
            if whole is not None:
                with context.clock.computing("experts"):
                    y, listed = self.apply(residual, whole, context.used.listed)
                context.used.add(self.layer, listed)
                return y
        clock, prefetcher = context.clock, context.prefetcher
        with clock.computing("experts"):
            x, scores = self.router.normalize_and_score(residual)
        guess = None
        if prefetcher is not None:
            with clock.computing("router_wait"):
                guess = prefetcher.guess(self.layer, residual)
        routing = self.router.route(x, scores, clock, *(() if guess is None else (guess,)))
        if context.observer is not None:
            context.observer(self.layer, routing.experts)

        def after_last_fetch() -> None:
            if prefetcher is not None:
                prefetcher.chosen(self.layer, routing.experts, guess)

        def before_group(done: float) -> None:
            if len(residual) > BLOCK:
                context.reach(self.place + (1 + done) / 2)

        groups = ExpertGroups(self.store, self.layer, routing.experts, clock, after_last_fetch, before_group)
        if self.router.norm is None:
            residual = mx.zeros_like(x)
        return self.strategy(x, residual, routing, self.shared, groups)

    def apply(self, residual: mx.array, whole: LayerInMemory, earlier: mx.array) -> tuple[mx.array, mx.array]:
        """Route and apply the experts of ``whole``, the result of ``whole_layer``; see ``ExpertsInMemory``."""
        assert self.in_memory is not None
        return self.in_memory(residual, self.router, self.shared, whole, earlier)

    def whole_layer(self, tokens: int) -> LayerInMemory | None:
        """Return all experts of the layer if ``tokens`` tokens can use them without waiting for the router's choice."""
        if self.in_memory is None or tokens > self.in_memory.most_tokens:
            return None
        return self.store.in_memory(self.layer)

    def with_store(self, store: ExpertStore, experts_k: int) -> "MixtureOfExperts":
        """Return this block with ``experts_k`` routed experts for each token, served by ``store``.

        The records of ``store`` must have the same layout as those of the current store.
        """
        return replace(self, store=store, router=replace(self.router, experts_k=experts_k))

    def on_nodes(self, nodes: Nodes, *, in_memory: bool) -> "MixtureOfExperts":
        """Return this block as one of ``nodes``, each of which applies the experts that its store serves.

        ``in_memory`` is whether the stores of all nodes hold all of their experts in memory.
        """
        whole = self.in_memory
        assert not isinstance(whole, ExpertsInMemoryOfNodes)
        together = ExpertsInMemoryOfNodes(whole, nodes) if in_memory and whole is not None else None
        return replace(self, strategy=ExpertsOnNodes(self.strategy, nodes), in_memory=together)
