"""Eviction policies, which choose the expert of a layer that loses its slot: LRU, LFU, S3-FIFO, and pinned experts.

A policy sees only the sequence of requests, so the same requests always lead to the same victims.
"""

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

from flashmoe_mlx.errors import InputError

__all__ = ["LFU", "LRU", "POLICIES", "S3FIFO", "EvictionPolicy", "Pinned", "make_policy"]


class EvictionPolicy(ABC):
    """Base class of eviction policies; each layer has its own policy object.

    ``SlotCache`` reports each request: first a ``hit`` for every expert that has a slot, then, for each of the
    remaining experts, an ``evict`` if no slot is free and an ``insert``; both in the order of the request.
    """

    @abstractmethod
    def hit(self, expert: int) -> None:
        """Note a request for ``expert``, which has a slot."""

    @abstractmethod
    def insert(self, expert: int) -> None:
        """Note a request for ``expert``, which had no slot and has one now."""

    @abstractmethod
    def evict(self, keep: Collection[int]) -> int:
        """Choose an expert outside ``keep``, the current request, and forget it. Such an expert always exists."""

    @abstractmethod
    def drop(self, expert: int) -> None:
        """Forget ``expert``, which has a slot but could not be read, as if it had never been requested."""


class LRU(EvictionPolicy):
    """A policy that evicts the least recently used expert."""

    def __init__(self) -> None:
        self._oldest_first: OrderedDict[int, None] = OrderedDict()

    def hit(self, expert: int) -> None:
        self._oldest_first.move_to_end(expert)

    def insert(self, expert: int) -> None:
        self._oldest_first[expert] = None

    def evict(self, keep: Collection[int]) -> int:
        victim = next(expert for expert in self._oldest_first if expert not in keep)
        del self._oldest_first[victim]
        return victim

    def drop(self, expert: int) -> None:
        del self._oldest_first[expert]


class LFU(EvictionPolicy):
    """A policy that evicts the least frequently used expert; among equally frequent experts, the least recently used.

    The counts cover every request since the start, including requests for experts that have since lost their slots
    ("perfect" LFU), and never decay.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._last_use: dict[int, int] = {}  # only for experts in slots
        self._clock = 0
        # One entry (count, last use, expert) for each expert in a slot. A hit leaves the entry too small; ``evict``
        # corrects it when it reaches the top.
        self._heap: list[tuple[int, int, int]] = []

    def hit(self, expert: int) -> None:
        self._counts[expert] += 1
        self._clock += 1
        self._last_use[expert] = self._clock

    def insert(self, expert: int) -> None:
        self._counts.setdefault(expert, 0)
        self.hit(expert)
        heapq.heappush(self._heap, (self._counts[expert], self._clock, expert))

    def evict(self, keep: Collection[int]) -> int:
        kept = []
        while True:
            _, used, expert = self._heap[0]
            last_use = self._last_use[expert]
            if used != last_use:
                heapq.heapreplace(self._heap, (self._counts[expert], last_use, expert))
            elif expert in keep:
                kept.append(heapq.heappop(self._heap))
            else:
                break
        heapq.heappop(self._heap)
        for entry in kept:
            heapq.heappush(self._heap, entry)
        del self._last_use[expert]
        return expert

    def drop(self, expert: int) -> None:
        del self._counts[expert], self._last_use[expert]
        self._heap = [entry for entry in self._heap if entry[2] != expert]
        heapq.heapify(self._heap)


class S3FIFO(EvictionPolicy):
    """A policy with a small queue, from which experts without a second request are soon evicted, and a main queue.

    Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1: a small queue for a tenth
    of ``capacity`` (rounded down, at least 1), a main queue for the remaining slots, and a ghost queue. The ghost queue
    remembers as many experts evicted from the small queue as the main queue holds. Hits are counted up to 3. More than
    one hit moves an expert from the small queue into the main queue, where its count restarts at 0; a requested ghost
    goes there directly. In the main queue an expert goes around once more for each hit.

    This class decides three points that the paper leaves open. An eviction ends when one expert has lost its slot, even
    if it only freed a place in the main queue for an expert from the small queue. An expert of the current request is
    skipped and keeps its place. If no expert of a queue can be evicted, an expert of the other queue is.
    """

    _MAX_HITS = 3

    def __init__(self, capacity: int) -> None:
        self._small_size = max(1, capacity // 10)
        self._main_size = capacity - self._small_size
        # Hits by expert, oldest expert first.
        self._small: OrderedDict[int, int] = OrderedDict()
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghost: OrderedDict[int, None] = OrderedDict()

    def hit(self, expert: int) -> None:
        queue = self._small if expert in self._small else self._main
        queue[expert] = min(queue[expert] + 1, self._MAX_HITS)

    def insert(self, expert: int) -> None:
        if expert in self._ghost:
            del self._ghost[expert]
            self._main[expert] = 0
        else:
            self._small[expert] = 0

    def evict(self, keep: Collection[int]) -> int:
        victim = None
        if len(self._small) < self._small_size:
            victim = self._evict_main(keep)
        if victim is None:
            victim = self._evict_small(keep)
        if victim is None:
            victim = self._evict_main(keep)
        assert victim is not None
        return victim

    def _evict_small(self, keep: Collection[int]) -> int | None:
        queue, kept, victim = self._small, [], None
        while queue and victim is None:
            expert, hits = queue.popitem(last=False)
            if hits > 1:
                if len(self._main) >= self._main_size:
                    victim = self._evict_main(keep)
                self._main[expert] = 0
            elif expert in keep:
                kept.append((expert, hits))
            else:
                victim = expert
                self._remember(expert)
        _put_back(queue, kept)
        return victim

    def _evict_main(self, keep: Collection[int]) -> int | None:
        queue, kept, victim = self._main, [], None
        while queue and victim is None:
            expert, hits = queue.popitem(last=False)
            if hits > 0:
                queue[expert] = hits - 1
            elif expert in keep:
                kept.append((expert, hits))
            else:
                victim = expert
        _put_back(queue, kept)
        return victim

    def _remember(self, expert: int) -> None:
        self._ghost[expert] = None
        if len(self._ghost) > self._main_size:
            self._ghost.popitem(last=False)

    def drop(self, expert: int) -> None:
        del (self._small if expert in self._small else self._main)[expert]


def _put_back(queue: OrderedDict[int, int], kept: Sequence[tuple[int, int]]) -> None:
    for expert, hits in reversed(kept):
        queue[expert] = hits
        queue.move_to_end(expert, last=False)


class Pinned(EvictionPolicy):
    """A policy that keeps the hottest experts once they are in slots, and applies LRU to all other experts.

    The first experts of ``hot`` (hottest first) are pinned, up to half of ``capacity``, rounded down; the remaining
    slots serve the other experts of each request. No slot is reserved for a pinned expert before its first request. If
    a request needs more slots than the unpinned experts occupy, the coldest pinned expert outside the request loses its
    slot; it is pinned again when it returns.
    """

    def __init__(self, capacity: int, hot: Sequence[int]) -> None:
        self._pin_order = tuple(hot[: capacity // 2])
        self._pinned = frozenset(self._pin_order)
        self._pinned_with_slot: set[int] = set()
        self._unpinned_oldest_first: OrderedDict[int, None] = OrderedDict()

    def hit(self, expert: int) -> None:
        if expert not in self._pinned:
            self._unpinned_oldest_first.move_to_end(expert)

    def insert(self, expert: int) -> None:
        if expert in self._pinned:
            self._pinned_with_slot.add(expert)
        else:
            self._unpinned_oldest_first[expert] = None

    def evict(self, keep: Collection[int]) -> int:
        for expert in self._unpinned_oldest_first:
            if expert not in keep:
                del self._unpinned_oldest_first[expert]
                return expert
        victim = next(
            expert for expert in reversed(self._pin_order) if expert in self._pinned_with_slot and expert not in keep
        )
        self._pinned_with_slot.remove(victim)
        return victim

    def drop(self, expert: int) -> None:
        if expert in self._pinned:
            self._pinned_with_slot.remove(expert)
        else:
            del self._unpinned_oldest_first[expert]


POLICIES: Mapping[str, Callable[[int, Sequence[int]], EvictionPolicy]] = MappingProxyType(
    {
        "lru": lambda _capacity, _hot: LRU(),
        "lfu": lambda _capacity, _hot: LFU(),
        "s3fifo": lambda capacity, _hot: S3FIFO(capacity),
        "pinned": Pinned,
    }
)
"""Factories of the policies by name; the arguments are the number of slots and the hot experts."""


def make_policy(name: str, capacity: int, hot: Sequence[int] = ()) -> EvictionPolicy:
    """Create the eviction policy of one layer.

    Args:
        name: a key of ``POLICIES``.
        capacity: number of slots of the layer.
        hot: the known hot experts of the layer, most used first; only "pinned" uses them.

    Raises:
        InputError: there is no such policy (code "unknown_policy"), or "pinned" has no hot experts
            ("policy_without_trace").
    """
    if name not in POLICIES:
        raise InputError(
            f"backend.policy={name}: no such policy; there are {', '.join(POLICIES)}", code="unknown_policy"
        )
    if name == "pinned" and not hot:
        raise InputError(
            "backend.policy=pinned: no hot experts are known; record a routing trace first", code="policy_without_trace"
        )
    return POLICIES[name](capacity, hot)
