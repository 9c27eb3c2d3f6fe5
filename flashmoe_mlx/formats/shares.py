"""Shares of the experts: which of several nodes owns an expert.

Every node computes the same owners from the weights of all nodes, by a weighted rendezvous hash. If weights change,
experts move only to nodes whose part of the total grows.

Source: Schindelhauer and Schomaker, "Weighted Distributed Hash Tables", 2005 (the logarithmic method).
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import InputError, PackError
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

    def place(self, layer: int, num_experts: int, expert: int) -> int:
        """Return the number of experts of ``layer`` before ``expert`` that this node owns.

        Raises:
            PackError: another node owns ``expert``; code "expert_not_packed".
        """
        place = int(_places(self.node, self.weights, layer, num_experts)[expert])
        if place < 0:
            raise PackError(
                f"layer {layer} expert {expert} is not in this pack of node {self.node} of {self.nodes}",
                code="expert_not_packed",
            )
        return place

    def owns_as(self, other: "Share", num_layers: int, num_experts: int) -> bool:
        """Return whether both shares are the same experts of the same node."""
        same = self.node == other.node and self.nodes == other.nodes
        return same and self.digest(num_layers, num_experts) == other.digest(num_layers, num_experts)

    def digest(self, num_layers: int, num_experts: int) -> str:
        """Return a short text that is equal on nodes that agree about the owners of all experts."""
        owned = [owners(self.weights, layer, num_experts).tobytes() for layer in range(num_layers)]
        return hashlib.sha256(b"".join(owned)).hexdigest()[:16]

    def __str__(self) -> str:
        parts = "equal weights" if len({*self.weights}) == 1 else f"weights {[float(f'{w:g}') for w in self.weights]}"
        return f"the experts of node {self.node} of {self.nodes} ({parts})"

    def to_json(self) -> dict[str, Any]:
        """Return the share for records."""
        return {"node": self.node, "weights": list(self.weights)}


def parse_shard(text: str, weights: Sequence[float] | None = None) -> Share:
    """Return the share that ``text`` names, such as "1/2" for node 0 of two.

    Raises:
        InputError: ``text`` is not a node of 1 to 64 nodes (code "invalid_shard"), or ``weights`` are wrong
            ("invalid_weights").
    """
    found = re.fullmatch(r"(\d{1,3})/(\d{1,3})", text.strip())
    part, nodes = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= nodes <= MOST_NODES:
        raise InputError(
            f"shard={text}: must be a part and the number of nodes, at most {MOST_NODES}: 1/2 is node 0 of two",
            code="invalid_shard",
        )
    if weights is not None and len(weights) != nodes:
        raise InputError(f"weights={list(weights)}: {len(weights)} weights for {nodes} nodes", code="invalid_weights")
    return Share(part - 1, (1.0,) * nodes if weights is None else tuple(map(float, weights)))


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


@lru_cache(maxsize=2048)
def _places(node: int, weights: tuple[float, ...], layer: int, num_experts: int) -> npt.NDArray[np.int32]:
    """Return the place of each expert among those of ``node``, -1 for experts of other nodes."""
    owned = _owned(node, weights, layer, num_experts)
    places: npt.NDArray[np.int32] = np.where(owned, np.cumsum(owned) - 1, -1).astype(np.int32)
    return places


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


def first_extents(source: ExpertSource) -> Sequence[Extent]:
    """Return the byte ranges of the first expert that a store of ``source`` serves; none if it serves none."""
    return next(
        (source.extents(layer, own[0]) for layer in range(source.num_layers) if (own := served(source, layer))), ()
    )


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
