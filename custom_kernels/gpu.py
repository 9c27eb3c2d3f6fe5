"""The operations that run as Metal or CUDA kernels, with samples for each of their code paths.

Samples have the true sizes of the model: kernels are compiled for these, and then are ready for the first token.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import attention, dense_experts, gated_delta_net, quantised_matvec, routed_experts
from flashmoe_mlx.custom_kernels.expert_mlp.reference import ExpertWeights, Weight
from flashmoe_mlx.custom_kernels.inputs import Geometry, Inputs, attention_inputs, delta_inputs
from flashmoe_mlx.custom_kernels.operation import CodePath, Operation, Sample
from flashmoe_mlx.custom_kernels.shapes import ModelShapes

_SEVERAL = 5
_DRAWN_ROWS = 4099
"""Rows of a matrix that are drawn; those of a larger one repeat them. No multiple of anything that kernels count in."""
_COMPARED_ROWS = 128
"""Rows at either end of a matrix whose products are compared."""


def operations() -> dict[str, Operation[Any, Any]]:
    """Make the operations with kernels for GPUs, by name."""
    everything = (
        Operation(
            name="attention",
            reference=attention.reference.gated_attention,
            mlx=attention.gated_attention,
            custom=attention.fused_gated_attention,
            path=attention.code_path,
            code_paths=_attention_samples,
        ),
        Operation(
            name="gated_delta_net",
            reference=gated_delta_net.reference.gated_delta_net,
            mlx=gated_delta_net.in_chunks,
            custom=gated_delta_net.step,
            path=gated_delta_net.code_path,
            code_paths=_delta_samples,
        ),
        Operation(
            name="routed_experts",
            reference=routed_experts.reference.routed_experts,
            mlx=routed_experts.by_expert,
            custom=routed_experts.routed_experts,
            path=routed_experts.code_path,
            code_paths=_expert_samples,
        ),
        Operation(
            name="dense_experts",
            reference=dense_experts.reference.dense_experts,
            mlx=dense_experts.reference.dense_experts,
            custom=dense_experts.dense_experts,
            path=dense_experts.code_path,
            code_paths=_dense_samples,
        ),
        Operation(
            name="quantised_matvec",
            reference=quantised_matvec.reference.quantised_matvec,
            mlx=quantised_matvec.by_mlx,
            custom=quantised_matvec.quantised_matvec,
            path=quantised_matvec.code_path,
            code_paths=_matvec_samples,
        ),
    )
    return {operation.name: operation for operation in everything}


def _attention_samples(model: ModelShapes) -> Iterator[Sample]:
    for weights in model.attention[:1]:
        geometry = Geometry(0, 0, weights.heads, weights.kv_heads, weights.head_dim, weights.rotary_dim, 0, 0, 0, 0)
        for tokens, start in ((1, 300), (_SEVERAL, 70)):
            made = attention_inputs(
                geometry, model.dtype, context=start + tokens, tokens=tokens, theta=weights.theta, eps=weights.eps
            )
            written = [mx.contiguous(part * 1) for part in (made.keys, made.values)]
            mx.eval(written)
            own = replace(weights, q_norm=made.weights.q_norm, k_norm=made.weights.k_norm)
            arguments = (*made.arrays, own, written[0], written[1], start)
            if attention.code_path(*arguments) is not None:
                yield Sample(arguments, (*made.arrays, own, made.keys, made.values, start))


def _delta_samples(model: ModelShapes) -> Iterator[Sample]:
    for weights in model.delta[:1]:
        geometry = Geometry(
            0, 0, 0, 0, 0, 0, weights.key_heads, weights.value_heads, weights.key_dim, weights.value_dim
        )
        for tokens in (1, _SEVERAL):
            made = delta_inputs(geometry, model.dtype, tokens=tokens, taps=weights.taps, eps=weights.eps)
            arguments = (*made.arrays, made.weights, made.past, made.state)
            if gated_delta_net.code_path(*arguments) is not None:
                yield Sample(arguments, arguments)


def _expert_samples(model: ModelShapes) -> Iterator[Sample]:
    if model.experts is None or not routed_experts.fits(model.experts, model.dtype):
        return
    inputs, form, k = Inputs(model.dtype, 0), model.experts, model.experts_k
    slab = inputs.slab(form, 3)
    joined = [shared for shared in model.shared if routed_experts.joins(shared, form)]
    drawn = [ExpertWeights(*(inputs.like(one) for one in (each.gate, each.up, each.down))) for each in joined[:1]]
    several = routed_experts.most_tokens()
    for tokens in (1, min(several, 9)):
        rows = np.full((tokens, k), -1, np.int32)
        if tokens == 1:
            rows[0] = np.arange(k) % 3
        else:
            rows[:, 0] = np.arange(tokens) % 3
            rows[0, -1] = 1
        alone = len(joined) < len(model.shared) or model.in_several_groups(1 if tokens == 1 else several)
        for shared in [*drawn, *([None] if alone else [])]:
            x = inputs.normal(tokens, form.hidden_size)
            shares = mx.softmax(inputs.normal(tokens, k + (shared is not None), dtype=mx.float32), axis=-1)
            arguments = (x, slab, mx.array(rows), shares, form, shared)
            yield Sample(arguments, arguments)


def _dense_samples(model: ModelShapes) -> Iterator[Sample]:
    if model.experts is not None and dense_experts.fits(model.experts, model.dtype):
        slab = Inputs(model.dtype, 0).slab(model.experts, 2)
        arguments = (slab, mx.array([1, 0], mx.int32), model.experts, model.dtype)
        yield Sample(arguments, arguments)


def _matvec_samples(model: ModelShapes) -> Iterator[Sample]:
    """For every path the first matrix of the model that takes it."""
    inputs, seen = Inputs(model.dtype, 0), set[CodePath | None]([None])
    for weight in (weight for projection in model.projections for weight in projection.weights):
        scales, biases, bits, group_size = weight.scales, weight.biases, weight.bits, weight.group_size
        assert scales is not None
        assert biases is not None
        assert bits is not None
        assert group_size is not None
        drawn: Weight | None = None
        for tokens in (1, quantised_matvec.MOST_TOKENS):
            stand_in = mx.zeros((tokens, weight.columns), model.dtype)
            path = quantised_matvec.code_path(stand_in, weight.weight, scales, biases, bits, group_size)
            if path not in seen:
                seen.add(path)
                drawn = drawn or _drawn(inputs, weight)
                yield _matvec_sample(inputs.normal(tokens, weight.columns), drawn, bits, group_size)


def _drawn(inputs: Inputs, weight: Weight) -> Weight:
    rows = len(weight.weight)
    if rows <= _DRAWN_ROWS:
        return inputs.like(weight)
    return _rows_of(inputs.like(weight, _DRAWN_ROWS), mx.arange(rows) % _DRAWN_ROWS)


def _rows_of(weight: Weight, rows: mx.array) -> Weight:
    assert weight.scales is not None
    assert weight.biases is not None
    parts = weight.weight[rows], weight.scales[rows], weight.biases[rows]
    mx.eval(parts)
    return Weight(*parts, weight.bits, weight.group_size)


def _matvec_sample(x: mx.array, weight: Weight, bits: int, group_size: int) -> Sample:
    rows = len(weight.weight)
    ends = {*range(min(rows, _COMPARED_ROWS)), *range(max(0, rows - _COMPARED_ROWS), rows)}
    shown = mx.array(sorted(ends))
    part = _rows_of(weight, shown)
    return Sample(
        (x, weight.weight, weight.scales, weight.biases, bits, group_size),
        (x, part.weight, part.scales, part.biases, bits, group_size),
        lambda results: [results[0][:, shown]],
    )
