"""Shares of the experts: which of several nodes owns an expert.

Every node computes the same owners from the weights of all nodes, by a weighted rendezvous hash. If weights change,
experts move only to nodes whose part of the total grows.

Source: Schindelhauer and Schomaker, "Weighted Distributed Hash Tables", 2005 (the logarithmic method).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource, Extent
from flashmoe_mlx.formats.record import LayerLayouts

MOST_NODES = 64
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Constants of SplitMix64."""


@dataclass(frozen=True, slots=True)
class Share:
    """The experts of one of several nodes.

    Attributes:
        node: the index of the node.
        weights: the weight of each node: the part of all experts that it owns is its part of the sum.
    """

    node: int
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        check_weights(self.weights)

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return len(self.weights)

    def owned(self, layer: int, num_experts: int) -> npt.NDArray[np.bool_]:
        """Return whether this node owns each of the ``num_experts`` experts of ``layer``, bool [experts]."""
        return _owned(self.node, self.weights, layer, num_experts)

    def experts(self, layer: int, num_experts: int) -> list[int]:
        """Return the experts of ``layer`` that this node owns, in ascending order."""
        experts: list[int] = np.flatnonzero(self.owned(layer, num_experts)).tolist()
        return experts

    def digest(self, num_layers: int, num_experts: int) -> str:
        """Return a short text that is equal on nodes that agree about the owners of all experts."""
        owned = [owners(self.weights, layer, num_experts).tobytes() for layer in range(num_layers)]
        return hashlib.sha256(b"".join(owned)).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return the share for records."""
        return {"node": self.node, "weights": list(self.weights)}


def check_weights(weights: Sequence[float]) -> None:
    """Raise InputError, code "invalid_weights", unless there is one positive number for each of 1 to 64 nodes."""
    numbers = all(isinstance(weight, int | float) and not isinstance(weight, bool) for weight in weights)
    if not (1 <= len(weights) <= MOST_NODES and numbers and all(0 < weight < float("inf") for weight in weights)):
        raise InputError(
            f"nodes.weights={list(weights)}: must hold a positive number for each of 1 to {MOST_NODES} nodes",
            code="invalid_weights",
        )


def owners(weights: Sequence[float], layer: int, num_experts: int) -> npt.NDArray[np.uint8]:
    """Return the node that owns each expert of ``layer``, uint8 [experts].

    The node with the highest score -weight / log(hash) owns an expert, where the hash of layer, expert and node is
    uniform between 0 and 1.
    """
    experts = np.arange(num_experts, dtype=np.uint64)
    scores = np.empty((len(weights), num_experts))
    for node, weight in enumerate(weights):
        mixed = _mixed(_mixed(_mixed(experts) + np.uint64(layer)) + np.uint64(node))
        uniform = (np.right_shift(mixed, np.uint64(11)).astype(np.float64) + 0.5) / 2**53
        scores[node] = -weight / np.log(uniform)
    best: npt.NDArray[np.uint8] = scores.argmax(axis=0).astype(np.uint8)
    return best


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply one step of SplitMix64 to each value."""
    z = values + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=2048)
def _owned(node: int, weights: tuple[float, ...], layer: int, num_experts: int) -> npt.NDArray[np.bool_]:
    owned: npt.NDArray[np.bool_] = owners(weights, layer, num_experts) == node
    owned.setflags(write=False)
    return owned


@dataclass(frozen=True, slots=True)
class SharedSource:
    """The experts of a model, of which a store serves only a share.

    Attributes:
        source: the experts.
        share: the share.
    """

    source: ExpertSource
    share: Share

    @property
    def layout(self) -> LayerLayouts:
        """The layout of the records of each layer."""
        return self.source.layout

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return self.source.num_layers

    @property
    def num_experts(self) -> int:
        """The number of experts in each layer, on all nodes together."""
        return self.source.num_experts

    def extents(self, layer: int, expert: int) -> Sequence[Extent]:
        """Return the byte ranges of an expert."""
        return self.source.extents(layer, expert)


def share_of(source: ExpertSource) -> Share | None:
    """Return the share of ``source`` that stores serve; None if they serve all experts."""
    return source.share if isinstance(source, SharedSource) else None


def served(source: ExpertSource, layer: int) -> Sequence[int]:
    """Return the experts of ``layer`` that a store of ``source`` serves, in ascending order."""
    share = share_of(source)
    return range(source.num_experts) if share is None else share.experts(layer, source.num_experts)


def not_owned(share: Share, layer: int, num_experts: int, experts: Sequence[int]) -> list[int]:
    """Return the ``experts`` of ``layer`` that other nodes own."""
    owned = share.owned(layer, num_experts)
    return [expert for expert in experts if not owned[expert]]


def count_served(source: ExpertSource, layers: Sequence[int], experts: npt.NDArray[np.integer]) -> int:
    """Count the distinct experts of each layer that a store of ``source`` serves; ``experts`` is [layers, N]."""
    ordered = np.sort(experts, axis=1)
    counted = np.ones(ordered.shape, np.bool_)
    counted[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    share = share_of(source)
    if share is not None:
        for layer, row, counts in zip(layers, ordered, counted, strict=True):
            counts &= share.owned(layer, source.num_experts)[row]
    return int(counted.sum())
