"""Designs of simulated caches, and the capacities to compare."""

from dataclasses import dataclass

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.stores.policies import POLICIES

__all__ = ["BELADY", "SCOPES", "SIMULATED", "CacheDesign", "capacities"]

BELADY = "belady"
"""The optimal policy, which knows all later requests."""
SIMULATED = (*POLICIES, BELADY)
"""The names of all policies that the simulator knows."""
SCOPES = ("layer", "global")
"""Whether each layer has its own slots, or all layers share the slots."""


@dataclass(frozen=True)
class CacheDesign:
    """The design of a cache to simulate.

    Attributes:
        policy: a policy of ``ram_hybrid``, or "belady", which knows all future requests.
        slots: slots per layer.
        scope: "layer" for separate slots in each layer, "global" for one pool with the slots of all layers.
        fetch_slots: largest number of experts in one fetch.
        prefill_chunk: tokens of the prompt that are requested together, as in the engine.

    Raises:
        InputError: the policy or scope does not exist (codes "unknown_policy", "unknown_scope"), or a number is less
            than 1 ("out_of_range").
    """

    policy: str
    slots: int
    scope: str = "layer"
    fetch_slots: int = 16
    prefill_chunk: int = 1024

    def __post_init__(self) -> None:
        if self.policy not in SIMULATED:
            raise InputError(
                f"policy={self.policy}: no such policy; choose from {', '.join(SIMULATED)}", code="unknown_policy"
            )
        if self.scope not in SCOPES:
            raise InputError(f"scope={self.scope}: choose from {', '.join(SCOPES)}", code="unknown_scope")
        for name in ("slots", "fetch_slots", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1", code="out_of_range")

    @property
    def at_once(self) -> int:
        """The largest number of experts in one fetch: ``fetch_slots``, or ``slots`` if that is smaller."""
        return min(self.fetch_slots, self.slots)


def capacities(num_experts: int, k: int) -> list[int]:
    """Return numbers of slots for a curve, from ``k`` to ``num_experts``; each is about 3/4 or 2/3 of the next."""
    counts = {min(k, num_experts), num_experts}
    slots = num_experts
    while slots > k:
        counts |= {slots, slots * 3 // 4}
        slots //= 2
    return sorted(count for count in counts if count >= k)
