"""Rows of several sequences in one array, one sequence after the other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import mlx.core as mx

CacheT = TypeVar("CacheT")

BLOCK = 1024
"""The largest number of tokens whose intermediate results exist at the same time, a multiple of ``_ALIGNMENT``."""
_ALIGNMENT = 64
"""Blocks end at multiples of this, the number of tokens in a chunk of a recurrence."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the rows of several sequences.

    Attributes:
        rows: the rows of the block.
        sequences: the sequences with rows in the block.
        lengths: the number of rows of each of these sequences in the block.
    """

    rows: slice
    sequences: slice
    lengths: list[int]


def blocks(lengths: Sequence[int], most: int) -> Iterator[Block]:
    """Divide the rows of sequences with ``lengths`` rows into blocks of similar size, at most ``most`` rows each."""
    total = sum(lengths)
    count = -(-total // most)
    ends = list(accumulate(lengths))
    start = first = 0
    for number in range(1, count + 1):
        end = min(total, -(-total * number // count // _ALIGNMENT) * _ALIGNMENT)
        inside: list[int] = []
        last, done = first, start
        while done < end:
            inside.append(min(end, ends[last]) - done)
            done += inside[-1]
            last += 1
        yield Block(slice(start, end), slice(first, last), inside)
        start, first = end, last - (ends[last - 1] > end)


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
