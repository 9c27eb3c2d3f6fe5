"""The routed experts of many tokens: several experts at a time are dequantized once and applied to all their tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels.add_rows import reference as add_rows
from flashmoe_mlx.custom_kernels.expert_format import ExpertFormat
from flashmoe_mlx.custom_kernels.gather_rows import reference as gather_rows

DenseExperts = Callable[[mx.array, mx.array, ExpertFormat, mx.Dtype], tuple[mx.array, mx.array, mx.array]]
Indices = npt.NDArray[np.intp]

AT_ONCE = 16
"""Experts that are dense at once: 0.4 GB at the 397B geometry, in bf16."""
MOST_PAIRS = 2**14
"""Pairs of an expert and a token, padding included, that are applied at once, unless one expert has more tokens."""
_MOST_PADDING = 2**11
"""Padded pairs from which a further call costs less than the padding."""


@dataclass(frozen=True, slots=True)
class RowKernels:
    """Implementations that gather tokens for experts and add the experts' outputs.

    Attributes:
        gather: as ``gather_rows.reference.gather_rows``.
        add: as ``add_rows.reference.add_rows``.
    """

    gather: Callable[[mx.array, mx.array], mx.array] = gather_rows.by_mlx
    add: Callable[[mx.array, mx.array, mx.array, mx.array], mx.array] = add_rows.by_mlx


def grouped_experts(
    x: mx.array,
    slab: mx.array,
    rows: npt.NDArray[np.int32],
    routing_weights: mx.array,
    form: ExpertFormat,
    dense_experts: DenseExperts,
    row_kernels: RowKernels,
) -> mx.array:
    """Compute ``reference.routed_experts`` without a shared expert, for many tokens.

    The tokens of an expert are padded to the largest number of tokens of an expert beside it. Experts are therefore
    applied by descending numbers of tokens, at most ``AT_ONCE`` at a time, whose sums are in the order of choices.

    Args:
        x: [T, hidden].
        slab: records, uint8 [records, record_bytes].
        rows: row of ``slab`` of each expert, int32 [T, K]; -1 for a choice to skip.
        routing_weights: f32 [T, K].
        form: format of the records.
        dense_experts: an implementation of ``dense_experts``.
        row_kernels: implementations of ``gather_rows`` and ``add_rows``.

    Returns:
        f32 [T, hidden].
    """
    tokens, choices = np.nonzero(rows >= 0)
    distinct, own, counts = np.unique(rows[tokens, choices], return_inverse=True, return_counts=True)
    by_use = np.argsort(-counts, kind="stable")
    order = np.lexsort((tokens, np.argsort(by_use)[own]))
    tokens, choices = tokens[order], choices[order]
    distinct, counts = distinct[by_use], counts[by_use]
    bounds = np.append(0, np.cumsum(counts))
    y = mx.zeros(x.shape, mx.float32)
    for start, end in _batches(counts):
        at = bounds[start : end + 1]
        pairs = slice(at[0], at[-1])
        experts = distinct[start:end]
        table, own = _places(at - at[0], tokens[pairs])
        inputs = row_kernels.gather(x, mx.array(table.ravel())).reshape(*table.shape, -1)
        gate, up, down = dense_experts(slab, mx.array(experts), form, x.dtype)
        gated = inputs @ gate.swapaxes(-1, -2)
        hidden = gated * mx.sigmoid(gated) * (inputs @ up.swapaxes(-1, -2))
        out = (hidden @ down.swapaxes(-1, -2)).reshape(-1, x.shape[1])
        places = np.full(rows.shape, -1, np.int32)
        places[tokens[pairs], choices[pairs]] = own
        y = row_kernels.add(y, out, mx.array(places), routing_weights)
    return y


def _batches(counts: Indices) -> Iterator[tuple[int, int]]:
    """Divide experts with descending ``counts`` of tokens into calls; yield the first expert and the end of each."""
    start = 0
    while start < len(counts):
        most, end, padding = int(counts[start]), start + 1, 0
        while end < min(len(counts), start + AT_ONCE) and (end + 1 - start) * most <= MOST_PAIRS:
            padding += most - int(counts[end])
            if padding > _MOST_PADDING:
                break
            end += 1
        yield start, end
        start = end


def _places(bounds: Indices, tokens: Indices) -> tuple[npt.NDArray[np.int32], Indices]:
    """Return the tokens of each expert, int32 [E, most], padded with 0, and the place of each pair in this table.

    Args:
        bounds: where the tokens of each expert begin and end in ``tokens``.
        tokens: token of each pair of a token and an expert.
    """
    counts = np.diff(bounds)
    most = -(-int(counts.max()) // 8) * 8
    places = np.repeat(np.arange(len(counts)) * most - bounds[:-1], counts) + np.arange(len(tokens))
    table = np.zeros(len(counts) * most, np.int32)
    table[places] = tokens
    return table.reshape(len(counts), most), places
