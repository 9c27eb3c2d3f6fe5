"""Routed experts of several nodes: each applies the experts that it owns, and one sum a layer joins their outputs."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.moe.groups import ExpertGroups
from flashmoe_mlx.moe.in_memory import ExpertsInMemory
from flashmoe_mlx.moe.on_host import ExpertsOnHost
from flashmoe_mlx.moe.router import Router, Routing
from flashmoe_mlx.moe.shared_expert import SharedExpert
from flashmoe_mlx.moe.strategies import RoutedExperts
from flashmoe_mlx.nodes.group import Nodes
from flashmoe_mlx.stores.delivery import LayerInMemory


@dataclass(slots=True)
class _Sum:
    """The sum of all nodes in one layer.

    Attributes:
        nodes: the nodes.
        clock: measures the wait for all other nodes.
        added: whether this node has added its part.
    """

    nodes: Nodes
    clock: PhaseClock
    added: bool = False

    @property
    def leads(self) -> bool:
        """Whether this is node 0."""
        return self.nodes.rank == 0

    def __call__(self, y: mx.array) -> mx.array:
        """Return the sum of ``y`` f32 [T, hidden] over all nodes."""
        self.clock.evaluate("experts", y)
        return self._add(y, failed=False)

    def fail(self, x: mx.array) -> None:
        """Tell all other nodes that this node has no sum for ``x`` [T, hidden], unless it has added one."""
        if not self.added:
            self._add(mx.zeros(x.shape, mx.float32), failed=True)

    def _add(self, y: mx.array, *, failed: bool) -> mx.array:
        self.added = True
        with self.clock.phase("nodes"):
            return self.nodes.add(y, failed)


@dataclass(frozen=True, slots=True)
class ExpertsOnNodes:
    """A strategy that applies this node's experts by another strategy, which adds the sums of all nodes.

    Every node has routed alike. A node adds its experts in ascending order, in f32; the sums of nodes are added
    afterwards, in f32, and rounded once. Logits therefore differ from those of one machine by the rounding of f32.

    Attributes:
        strategy: applies experts.
        nodes: the nodes.
    """

    strategy: RoutedExperts
    nodes: Nodes

    def __call__(
        self, x: mx.array, residual: mx.array, routing: Routing, shared: SharedExpert | None, groups: ExpertGroups
    ) -> mx.array:
        """Add routed and shared experts to ``residual``; see ``RoutedExperts``.

        Raises:
            NodeFailedError: another node cannot serve its experts.
            NodeLostError: another node is gone.
            StoppedError: node 0 cancelled the pass.
        """
        total = _Sum(self.nodes, groups.clock)
        if len(x) == 1 and groups.distinct and isinstance(self.strategy, ExpertsOnHost):
            # Choices without gaps may be applied as they arrive.
            routing = _of_node(routing, groups)
            groups = replace(groups, chosen=routing.experts)
        try:
            return self.strategy(x, residual, routing, shared, replace(groups, nodes=total))
        except Exception:
            total.fail(x)
            raise


def _of_node(routing: Routing, groups: ExpertGroups) -> Routing:
    """Return the ``routing`` of one token without the experts of other nodes."""
    own = np.flatnonzero(np.isin(routing.experts[0], groups.distinct))
    shared = np.arange(routing.experts.shape[1], routing.all_weights.shape[1])
    columns = np.concatenate([own, shared]).astype(np.uint32)
    return replace(routing, experts=routing.experts[:, own], all_weights=routing.all_weights[:, mx.array(columns)])


@dataclass(frozen=True, slots=True)
class ExpertsInMemoryOfNodes:
    """Routes tokens and applies their experts lazily, where the stores of all nodes hold all of their experts.

    Attributes:
        own: how one machine does so.
        nodes: the nodes.
    """

    own: ExpertsInMemory
    nodes: Nodes

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens for which the kernel is the best choice."""
        return self.own.most_tokens

    def __call__(
        self, residual: mx.array, router: Router, shared: SharedExpert | None, whole: LayerInMemory, earlier: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Add routed and shared experts to ``residual``; see ``ExpertsInMemory``. Rows of other nodes are -1."""
        own, leads = self.own, self.nodes.rank == 0
        x, scores = router.normalize_and_score(residual)
        fused = shared.weights if shared is not None and own.fuse_shared and leads else None
        part = residual.astype(mx.float32) if leads else mx.zeros(residual.shape, mx.float32)
        if own.chosen is not None and scores is not None:
            choice = (scores, whole.table, earlier, router.experts_k)
            part, listed = own.chosen(x, part, whole.slab, *choice, own.form, fused, router.renormalized)
        else:
            chosen, rows, all_weights = router.choose_rows(x, scores, whole.table)
            listed = mx.concatenate([earlier, chosen.reshape(-1).astype(mx.int32)])
            weights = all_weights[:, : router.experts_k] if fused is None else all_weights
            part = own.kernel(x, whole.slab, rows, weights, own.form, fused, part)
        y = self.nodes.add_lazily(part).astype(residual.dtype)
        if shared is not None and not own.fuse_shared:
            y = y + shared(x, all_weights[:, -1:].astype(x.dtype))
        return y, listed
