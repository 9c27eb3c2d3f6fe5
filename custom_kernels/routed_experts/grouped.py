"""The routed experts of many tokens: several experts at a time are dequantized once and applied to all their tokens."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels.expert_format import ExpertFormat

DenseExperts = Callable[[mx.array, mx.array, ExpertFormat, mx.Dtype], tuple[mx.array, mx.array, mx.array]]
Indices = npt.NDArray[np.intp]

AT_ONCE = 16
"""Experts that are dense at once: 0.4 GB at the 397B geometry, in bf16."""


def grouped_experts(
    x: mx.array,
    slab: mx.array,
    rows: npt.NDArray[np.int32],
    routing_weights: mx.array,
    form: ExpertFormat,
    dense_experts: DenseExperts,
) -> mx.array:
    """Compute ``reference.routed_experts`` without a shared expert, for many tokens.

    The tokens of an expert are padded to the largest number of tokens of an expert beside it. Sums are in the order of
    rows, whatever the order of work on the GPU.

    Args:
        x: [T, hidden].
        slab: records, uint8 [records, record_bytes].
        rows: row of ``slab`` of each expert, int32 [T, K]; -1 for a choice to skip.
        routing_weights: f32 [T, K].
        form: format of the records.
        dense_experts: an implementation of ``dense_experts``.

    Returns:
        f32 [T, hidden].
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
        y = _added(y, out, places, tokens[pairs], choices[pairs], routing_weights)
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
    """Return the outputs of ``experts`` and, for each pair of a token and an expert, its row among the outputs.

    Args:
        x: [T, hidden].
        slab: the records.
        experts: rows of ``slab``.
        bounds: where the tokens of each expert begin and end in ``tokens``.
        tokens: row of ``x`` of each pair.
        form: format of the records.
        dense_experts: an implementation of ``dense_experts``.
    """
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
    y: mx.array, out: mx.array, places: Indices, tokens: Indices, choices: Indices, routing_weights: mx.array
) -> mx.array:
    """Return ``y`` plus the weighted outputs of all pairs, with each token updated once.

    Args:
        y: f32 [T, hidden].
        out: outputs of the experts.
        places: row of ``out`` of each pair of a token and an expert.
        tokens: token of each pair.
        choices: column of the pair in ``routing_weights``.
        routing_weights: f32 [T, K].
    """
    order = np.argsort(tokens, kind="stable")
    own, first, counts = np.unique(tokens[order], return_index=True, return_counts=True)
    token = np.repeat(np.arange(len(own)), counts)
    position = np.arange(len(tokens)) - np.repeat(first, counts)
    from_places, from_weights = (np.zeros((len(own), counts.max()), np.int32) for _ in range(2))
    from_places[token, position] = places[order]
    from_weights[token, position] = (tokens * routing_weights.shape[1] + choices)[order]
    used = np.arange(counts.max()) < counts[:, None]
    factors = mx.where(mx.array(used), routing_weights.reshape(-1)[mx.array(from_weights)], 0)
    parts = (out[mx.array(from_places)].astype(mx.float32) * factors[..., None]).sum(axis=1)
    return y.at[mx.array(own.astype(np.int32))].add(parts)
