"""Routed experts of several nodes: each applies the experts that it owns, and one sum a layer joins their outputs."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from flashmoe_mlx.moe.groups import ExpertGroups
from flashmoe_mlx.moe.in_memory import ExpertsInMemory
from flashmoe_mlx.moe.on_host import ExpertsOnHost
from flashmoe_mlx.moe.router import Router, Routing
from flashmoe_mlx.moe.shared_expert import SharedExpert, begin_shared
from flashmoe_mlx.moe.strategies import RoutedExperts
from flashmoe_mlx.nodes.group import Nodes
from flashmoe_mlx.stores.delivery import LayerInMemory


@dataclass(frozen=True, slots=True)
class ExpertsOnNodes:
    """A strategy that applies this node's experts by another strategy, and adds the outputs of all nodes.

    Every node has routed alike and computes the shared expert. A node adds its experts in ascending order; the outputs
    of nodes are added afterwards. Logits therefore differ by rounding from those of one machine.

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
        apart = begin_shared(shared, x, routing, groups.clock)
        failure: Exception | None = None
        y = mx.zeros_like(x)
        try:
            y = self._own(x, y, routing, groups)
            groups.clock.evaluate("experts", y)
        except Exception as error:
            failure, y = error, mx.zeros_like(x)
        with groups.clock.phase("nodes"):
            y = self.nodes.add(y, failed=failure is not None)
        if failure is not None:
            raise failure
        return residual + (y if apart is None else y + apart)

    def _own(self, x: mx.array, zeros: mx.array, routing: Routing, groups: ExpertGroups) -> mx.array:
        """Compute the sum of this node's experts [T, hidden]."""
        if len(x) == 1 and isinstance(self.strategy, ExpertsOnHost):
            # Choices without gaps may be applied as they arrive.
            routing = _of_node(routing, groups)
            groups = replace(groups, chosen=routing.experts)
        if not groups.distinct:
            groups.after_last_fetch()
            return zeros
        return self.strategy(x, zeros, routing, None, groups)


def _of_node(routing: Routing, groups: ExpertGroups) -> Routing:
    """Return the ``routing`` of one token without the experts of other nodes."""
    own = np.isin(routing.experts[0], groups.distinct)
    return replace(
        routing, experts=routing.experts[:, own], all_weights=routing.weights[:, mx.array(np.flatnonzero(own))]
    )


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
        x, scores = router.normalize_and_score(residual)
        chosen, rows, all_weights = router.choose_rows(x, scores, whole.table)
        listed = mx.concatenate([earlier, chosen.reshape(-1).astype(mx.int32)])
        weights = all_weights[:, : router.experts_k]
        y = self.nodes.add_lazily(self.own.kernel(x, whole.slab, rows, weights, self.own.form, None, None))
        if shared is not None:
            y = y + shared(x, all_weights[:, -1:].astype(x.dtype))
        return residual + y, listed
