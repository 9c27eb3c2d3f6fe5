"""Belady's optimal eviction policy, which knows all future requests.

Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2),
1966. The rule is optimal for requests of several experts, too, since all experts of a request must be in slots at once.
No policy can have fewer misses on the same requests, so the difference shows how much a better policy could gain.
"""

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from flashmoe_mlx.stores.policies import EvictionPolicy

_NEVER = 2**62


class Belady(EvictionPolicy):
    """A policy that evicts the expert whose next use is furthest away, and the smallest number in case of a tie.

    ``future`` lists all requests that the cache will receive, in order.
    """

    def __init__(self, future: Iterable[Sequence[int]]) -> None:
        uses: dict[int, list[int]] = defaultdict(list)
        for time, request in enumerate(future):
            for expert in request:
                uses[expert].append(time)
        self._uses = {expert: iter([*times[1:], _NEVER]) for expert, times in uses.items()}
        # Time of the next use of each expert in a slot.
        self._next: dict[int, int] = {}
        # (-next use, expert). An entry is outdated, and skipped, if the expert has since been used or evicted.
        self._heap: list[tuple[int, int]] = []

    def _record_use(self, expert: int) -> None:
        self._next[expert] = next(self._uses[expert])
        heapq.heappush(self._heap, (-self._next[expert], expert))

    def hit(self, expert: int) -> None:
        self._record_use(expert)

    def insert(self, expert: int) -> None:
        self._record_use(expert)

    def evict(self, keep: Collection[int]) -> int:
        protected = []
        while True:
            entry = heapq.heappop(self._heap)
            negated_use, expert = entry
            if self._next.get(expert) != -negated_use:
                continue
            if expert not in keep:
                break
            protected.append(entry)
        for entry in protected:
            heapq.heappush(self._heap, entry)
        del self._next[expert]
        return expert

    def drop(self, expert: int) -> None:
        raise NotImplementedError("a simulated read cannot fail")
