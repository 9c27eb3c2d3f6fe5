"""Rows of several sequences in one array, one sequence after the other."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

import mlx.core as mx

CacheT = TypeVar("CacheT")


def by_sequence(
    function: Callable[..., mx.array], rows: Sequence[mx.array], caches: Sequence[CacheT], lengths: Sequence[int]
) -> mx.array:
    """Call ``function`` for each sequence, with its cache and its rows of every array; join the results.

    Args:
        function: takes a cache and as many arrays as ``rows`` has, and returns an array with as many rows.
        rows: arrays [T, ...] of the new tokens of all sequences.
        caches: the cache of each sequence.
        lengths: the number of rows of each sequence; their sum is T.

    Returns:
        [T, ...], in the order of ``rows``.
    """
    if len(caches) == 1:  # no slices: each would be one more operation in the graph
        return function(caches[0], *rows)
    results = []
    for cache, length, end in zip(caches, lengths, accumulate(lengths), strict=True):
        results.append(function(cache, *(array[end - length : end] for array in rows)))
    return mx.concatenate(results)
