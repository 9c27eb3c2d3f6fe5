"""A map from the experts of one layer to slots of memory.

The map depends only on the sequence of requests, not on files or arrays: a store and a simulator that get the same
requests count the same hits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flashmoe_mlx.stores.policies import EvictionPolicy

__all__ = ["Placement", "SlotCache"]


@dataclass(frozen=True, slots=True)
class Placement:
    """The slots of a request's experts.

    Attributes:
        slots: the slot of every expert of the request.
        misses: experts that must be read, in the order of the request.
        evictions: number of experts that lost their slots to the misses.
    """

    slots: dict[int, int]
    misses: tuple[int, ...]
    evictions: int


class SlotCache:
    """A cache of the experts of one layer, which assigns slots. It is not thread-safe.

    Args:
        capacity: number of slots; their indices begin at 0.
        policy: chooses the expert that loses its slot.

    Raises:
        ValueError: ``capacity`` is less than 1.
    """

    def __init__(self, capacity: int, policy: EvictionPolicy) -> None:
        if capacity < 1:
            raise ValueError(f"a cache needs at least 1 slot, not {capacity}")
        self.capacity = capacity
        self._policy = policy
        self._slots: dict[int, int] = {}
        self._free = list(range(capacity - 1, -1, -1))  # used from the end

    def place(self, experts: Sequence[int]) -> Placement:
        """Give each of ``experts`` a slot; no expert of the request loses its slot to another.

        The policy sees one use of each expert: first the experts that have a slot, then the misses, each in the order
        of the request.

        Raises:
            ValueError: an expert occurs twice, or there are more than ``capacity``; the cache stays as it was.
        """
        request = frozenset(experts)
        if len(request) != len(experts):
            raise ValueError("an expert occurs twice in one request")
        if len(request) > self.capacity:
            raise ValueError(f"{len(request)} experts do not fit into {self.capacity} slots")
        slots, policy = self._slots, self._policy
        misses = []
        for expert in experts:
            if expert in slots:
                policy.hit(expert)
            else:
                misses.append(expert)
        evictions = 0
        for expert in misses:
            if self._free:
                slot = self._free.pop()
            else:
                slot = slots.pop(policy.evict(request))
                evictions += 1
            slots[expert] = slot
            policy.insert(expert)
        return Placement({expert: slots[expert] for expert in experts}, tuple(misses), evictions)

    def drop(self, experts: Iterable[int]) -> None:
        """Forget ``experts``, which could not be read, and free their slots; experts without a slot are ignored."""
        for expert in experts:
            if expert in self._slots:
                self._free.append(self._slots.pop(expert))
                self._policy.drop(expert)

    def slots(self, experts: Iterable[int]) -> list[int]:
        """Return the slots of ``experts``, all of which have one."""
        return [self._slots[expert] for expert in experts]

    def __contains__(self, expert: int) -> bool:
        return expert in self._slots

    def __len__(self) -> int:
        """Return the number of experts that have a slot."""
        return len(self._slots)
