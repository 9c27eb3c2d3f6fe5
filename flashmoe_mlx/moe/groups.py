"""Groups of a layer's experts: the experts of one group are computed while those of the next are read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.stores.delivery import ExpertBatch

_AT_ONCE = 16
"""Experts of a group where a layer needs more than twice as many: few, so that the first group arrives early."""


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Experts in slots, in ascending order, until the next group is fetched.

    Attributes:
        experts: indices of the experts.
        batch: the records of ``experts``, in the same order.
        is_last: whether no group follows.
        chosen: [T, K], the experts of each token in all groups.
        num_experts: experts of the layer.
        clock: measures the computation with this group.
    """

    experts: Sequence[int]
    batch: ExpertBatch
    is_last: bool
    chosen: npt.NDArray[np.uint32]
    num_experts: int
    clock: PhaseClock

    def rows(self, places: Sequence[int]) -> npt.NDArray[np.int32]:
        """Return the place of each choice, [T, K]: ``places[i]`` for ``experts[i]``, -1 for experts of other groups."""
        table = np.full(self.num_experts, -1, np.int32)
        table[self.experts] = places
        return table[self.chosen]

    def finish(self, y: mx.array) -> None:
        """Evaluate ``y``, the sum so far, if another group follows: its fetch refills the slots that ``y`` reads."""
        if not self.is_last:
            self.clock.evaluate("experts", y)


class SumOfNodes(Protocol):
    """Adds the sums of several nodes in one layer; called once."""

    @property
    def leads(self) -> bool:
        """Whether this is node 0."""
        ...

    def __call__(self, y: mx.array) -> mx.array:
        """Return the sum of ``y`` f32 [T, hidden] over all nodes."""
        ...


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """The distinct experts that T tokens chose in one layer, fetched group by group.

    Each expert is fetched once, and tokens of several sequences share a fetch. After each fetch, the next group is
    hinted to the store, which reads it during the computation. Iterate once, and stop using a group before the next.

    Attributes:
        store: serves the experts.
        layer: index of the layer.
        chosen: [T, K], the experts of each token.
        clock: measures fetches and computation.
        after_last_fetch: called when all experts have been fetched, before any computation with the last group.
        before_group: called with the share of the groups that are done, before each fetch.
        nodes: adds the sums of several nodes; None on one machine.
    """

    store: ExpertStore
    layer: int
    chosen: npt.NDArray[np.uint32]
    clock: PhaseClock
    after_last_fetch: Callable[[], None]
    before_group: Callable[[float], None] = lambda _: None
    nodes: SumOfNodes | None = None

    @property
    def leads(self) -> bool:
        """Whether this machine adds what all nodes together add once, such as the shared expert."""
        return self.nodes is None or self.nodes.leads

    def joined(self, y: mx.array) -> mx.array:
        """Return ``y``, this machine's sum of experts in f32 [T, hidden], plus the sums of all other nodes."""
        return y if self.nodes is None else self.nodes(y)

    @property
    def distinct(self) -> list[int]:
        """The experts to fetch, in ascending order: all chosen experts, or the chosen experts that the store serves."""
        chosen, share = np.unique(self.chosen), self.store.share
        if share is not None:
            chosen = chosen[share.owned(self.layer, self.store.source.num_experts)[chosen]]
        distinct: list[int] = chosen.tolist()
        return distinct

    @property
    def fit(self) -> bool:
        """Whether one fetch holds all choices, even if no expert repeats, and none is an expert of another node."""
        if self.chosen.size > experts_at_once(self.store):
            return False
        share = self.store.share
        return share is None or bool(share.owned(self.layer, self.store.source.num_experts)[self.chosen].all())

    def fetch_in_parts(self, use: Callable[[ExpertGroup], None]) -> None:
        """Fetch all experts, which ``fit``, and call ``use`` with parts of them while others are being read.

        The first part may be empty. The time of ``use`` does not count as I/O.
        """
        distinct, num_experts = self.distinct, self.store.source.num_experts
        left = len(distinct)
        self.before_group(0.0)

        def arrived(experts: Sequence[int], batch: ExpertBatch) -> None:
            nonlocal left
            left -= len(experts)
            with self.clock.instead("io"):
                use(ExpertGroup(experts, batch, left == 0, self.chosen, num_experts, self.clock))

        with self.clock.phase("io"):
            self.store.fetch(self.layer, distinct, arrived)
            self.after_last_fetch()

    def __iter__(self) -> Iterator[ExpertGroup]:
        """Fetch and yield each group on demand."""
        distinct = self.distinct
        size, num_experts = self._size(len(distinct)), self.store.source.num_experts
        groups = [distinct[start : start + size] for start in range(0, len(distinct), size)]
        if not groups:  # other nodes own all chosen experts
            groups = [[]]
        for number, experts in enumerate(groups):
            self.before_group(number / len(groups))
            following = groups[number + 1] if number + 1 < len(groups) else None
            with self.clock.phase("io"):
                batch = self.store.fetch(self.layer, experts)
                if following is None:
                    self.after_last_fetch()
                else:
                    self.store.prefetch(self.layer, following)
            yield ExpertGroup(experts, batch, following is None, self.chosen, num_experts, self.clock)

    def _size(self, distinct: int) -> int:
        """Return the number of experts of a group, given the number of experts of all groups."""
        most = experts_at_once(self.store)
        return most if distinct <= most else min(most, _AT_ONCE)


def experts_at_once(store: ExpertStore) -> int:
    """Return the largest number of experts of a layer that are applied as one group."""
    return min(store.slots, 2 * _AT_ONCE) if store.reads else store.slots
