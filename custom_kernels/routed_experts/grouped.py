"""The routed experts of many tokens: each is made dense once and applied to all of its tokens, several at a time."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels.routed_experts.format import ExpertFormat

DenseExperts = Callable[[mx.array, mx.array, ExpertFormat, mx.Dtype], tuple[mx.array, mx.array, mx.array]]
Indices = npt.NDArray[np.intp]

AT_ONCE = 16
"""Experts that are dense at once: 0.4 GB of them at the 397B's geometry, in bf16."""


def grouped_experts(
    x: mx.array,
    slab: mx.array,
    rows: npt.NDArray[np.int32],
    shares: mx.array,
    form: ExpertFormat,
    dense_experts: DenseExperts,
) -> mx.array:
    """As ``reference.routed_experts`` without a shared expert, for many tokens; ``rows`` as the host knows them.

    Tokens of an expert are padded to those of the most wanted one beside it. The sums are in f32 and so is the result;
    they are in the order of rows, whatever the GPU does first.
    """
    tokens, choices = np.nonzero(rows >= 0)
    row = rows[tokens, choices]
    order = np.lexsort((tokens, row))
    tokens, choices, row = tokens[order], choices[order], row[order]
    distinct, first = np.unique(row, return_index=True)
    bounds = np.append(first, len(row))
    y = mx.zeros(x.shape, mx.float32)
    for start in range(0, len(distinct), AT_ONCE):
        at = bounds[start : start + AT_ONCE + 1]
        pairs = slice(at[0], at[-1])
        experts = distinct[start : start + AT_ONCE]
        out, places = _apply(x, slab, experts, at - at[0], tokens[pairs], form, dense_experts)
        y = _added(y, out, places, tokens[pairs], choices[pairs], shares)
    return y


def _apply(
    x: mx.array,
    slab: mx.array,
    experts: npt.NDArray[np.int32],
    bounds: Indices,
    tokens: Indices,
    form: ExpertFormat,
    dense_experts: DenseExperts,
) -> tuple[mx.array, Indices]:
    """The outputs of ``experts``, whose tokens lie between ``bounds``, and the row of each pair among them."""
    counts = np.diff(bounds)
    most = -(-int(counts.max()) // 8) * 8
    places = np.repeat(np.arange(len(counts)) * most - bounds[:-1], counts) + np.arange(len(tokens))
    table = np.zeros(len(counts) * most, np.int32)
    table[places] = tokens
    inputs = x[mx.array(table.reshape(len(counts), most))]
    gate, up, down = dense_experts(slab, mx.array(experts), form, x.dtype)
    gated = inputs @ gate.swapaxes(-1, -2)
    hidden = gated * mx.sigmoid(gated) * (inputs @ up.swapaxes(-1, -2))
    return (hidden @ down.swapaxes(-1, -2)).reshape(-1, x.shape[1]), places


def _added(
    y: mx.array, out: mx.array, places: Indices, tokens: Indices, choices: Indices, shares: mx.array
) -> mx.array:
    """``y`` with the outputs of all pairs, times their shares, added to their tokens, no token twice at once."""
    order = np.argsort(tokens, kind="stable")
    own, first, counts = np.unique(tokens[order], return_index=True, return_counts=True)
    token = np.repeat(np.arange(len(own)), counts)
    turn = np.arange(len(tokens)) - np.repeat(first, counts)
    from_places, from_shares = (np.zeros((len(own), counts.max()), np.int32) for _ in range(2))
    from_places[token, turn] = places[order]
    from_shares[token, turn] = (tokens * shares.shape[1] + choices)[order]
    used = np.arange(counts.max()) < counts[:, None]
    factors = mx.where(mx.array(used), shares.reshape(-1)[mx.array(from_shares)], 0)
    parts = (out[mx.array(from_places)].astype(mx.float32) * factors[..., None]).sum(axis=1)
    return y.at[mx.array(own.astype(np.int32))].add(parts)
