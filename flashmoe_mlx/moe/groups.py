"""Groups of a layer's experts, each as large as the slots of the store."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.stores.delivery import ExpertBatch


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


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """The distinct experts that T tokens chose in one layer, fetched group by group.

    Tokens of several sequences share a fetch. Iterate once, and stop using a group before the next.

    Attributes:
        store: serves the experts.
        layer: index of the layer.
        chosen: [T, K], the experts of each token.
        clock: measures fetches and computation.
        after_last_fetch: called when all experts have been fetched, before any computation with the last group.
    """

    store: ExpertStore
    layer: int
    chosen: npt.NDArray[np.uint32]
    clock: PhaseClock
    after_last_fetch: Callable[[], None]

    @property
    def fit(self) -> bool:
        """Whether one fetch holds all choices, even if no expert repeats."""
        return self.chosen.size <= self.store.slots

    def fetch_in_parts(self, use: Callable[[ExpertGroup], None]) -> None:
        """Fetch all experts, which ``fit``, and call ``use`` with parts of them while others are being read.

        The first part may be empty. The time of ``use`` does not count as I/O.
        """
        distinct, num_experts = sorted(set(self.chosen.ravel().tolist())), self.store.source.num_experts
        left = len(distinct)

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
        distinct, size = sorted(set(self.chosen.ravel().tolist())), self.store.slots
        num_experts = self.store.source.num_experts
        for start in range(0, len(distinct), size):
            experts, is_last = distinct[start : start + size], start + size >= len(distinct)
            with self.clock.phase("io"):
                batch = self.store.fetch(self.layer, experts)
                if is_last:
                    self.after_last_fetch()
            yield ExpertGroup(experts, batch, is_last, self.chosen, num_experts, self.clock)
