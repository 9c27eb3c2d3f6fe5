"""Estimate what several machines change: the slowest node of each layer decides, and a sum joins the nodes."""

from math import factorial

import numpy as np

from flashmoe_mlx.research.estimate.speed_model import Distribution

SUM_SECONDS = 3e-4
"""The time of one sum of all nodes over TCP; measured between processes of one machine, not between machines."""


def most_on_a_node(counts: Distribution, nodes: int) -> Distribution:
    """Return the distribution of the largest number of experts on a node.

    Args:
        counts: the distribution of the number of experts in a layer, on all nodes together.
        nodes: the number of nodes, each of which owns an expert with the same probability.
    """
    if nodes == 1:
        return counts
    cumulative = np.array(
        [[_at_most(total, most, nodes) for total in range(len(counts))] for most in range(len(counts))]
    )
    largest: Distribution = np.diff(cumulative @ counts, prepend=0.0)
    return largest


def _at_most(total: int, most: int, nodes: int) -> float:
    """Return the probability that none of ``nodes`` owns more than ``most`` of ``total`` experts."""
    one = np.array([1 / factorial(count) for count in range(min(most, total) + 1)])
    ways = np.ones(1)
    for _ in range(nodes):
        ways = np.convolve(ways, one)[: total + 1]
    return float(ways[total] * factorial(total) / nodes**total) if len(ways) > total else 0.0
