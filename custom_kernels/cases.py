"""Every custom kernel with inputs to run it on: at the shapes of real models, and at any other.

A case runs the kernel, what MLX offers in its place, and the reference in f64 on the same values.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import attention as attention_kernels
from flashmoe_mlx.custom_kernels import dense_experts as dense_kernels
from flashmoe_mlx.custom_kernels import gated_delta_net as delta_kernels
from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.custom_kernels import quantised_matvec as matvec_kernels
from flashmoe_mlx.custom_kernels import routed_experts as expert_kernels
from flashmoe_mlx.custom_kernels.gated_delta_net import chunked
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import GatedDelta
from flashmoe_mlx.custom_kernels.inputs import (
    GEOMETRIES,
    DeltaInputs,
    Geometry,
    Inputs,
    attention_inputs,
    delta_inputs,
    expert_inputs,
)
from flashmoe_mlx.custom_kernels.routed_experts import grouped
from flashmoe_mlx.custom_kernels.routed_experts.format import expert_format
from flashmoe_mlx.custom_kernels.routed_experts.grouped import DenseExperts
from flashmoe_mlx.formats.record import RecordLayout

__all__ = [
    "GEOMETRIES",
    "TOLERANCE",
    "Case",
    "Geometry",
    "Results",
    "attention",
    "attention_inputs",
    "delta_inputs",
    "dense_experts",
    "expert_inputs",
    "gated_delta_net",
    "gated_delta_net_in_chunks",
    "grouped_experts",
    "quantised_matvec",
    "relative_error",
    "routed_experts",
]

Results = tuple[mx.array, ...]

TOLERANCE = {mx.float32: 1e-5, mx.bfloat16: 1e-2}
"""Largest accepted ||kernel - reference|| / ||reference||, the reference in f64."""


@dataclass(frozen=True)
class Case:
    """One kernel on one set of inputs; every member computes its results again.

    ``custom`` may write in place into arrays that no other member reads. ``nbytes`` is what it must read and write at
    least.
    """

    operation: str
    title: str
    dtype: mx.Dtype
    nbytes: int
    custom: Callable[[], Results]
    standard: Callable[[], Results]
    reference: Callable[[], Results]

    def error(self) -> float:
        """The largest ||custom - reference|| / ||reference|| among the results; infinite if any value is NaN."""
        found = self.custom()
        mx.eval(found)
        with mx.stream(mx.cpu):
            expected = self.reference()
            mx.eval(expected)
        return max(relative_error(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def relative_error(found: mx.array, expected: mx.array) -> float:
    """||found - expected|| / ||expected||; infinite if shapes differ or any value is NaN or infinite."""
    if found.shape != expected.shape:
        return float("inf")
    ours, theirs = np.array(found.astype(mx.float32)).astype(np.float64), np.array(expected)
    if not np.isfinite(ours).all():
        return float("inf")
    difference, size = (float(np.linalg.norm(values)) for values in (ours - theirs, theirs))
    return difference / max(size, 1e-300)


def routed_experts(
    geometry: Geometry, dtype: mx.Dtype, *, on_cpu: bool = False, k: int = 4, tokens: int = 1, **options: Any
) -> Case:
    """Experts of a few tokens; ``options`` are those of ``expert_inputs``, ``on_cpu``: by the extension for CPUs."""
    made = expert_inputs(geometry, dtype, k=k, tokens=tokens, **options)
    form, own, rows = made.form, made.shared, np.array(made.rows)
    read = len(np.unique(rows[rows >= 0])) * made.payload_bytes
    read += sum(part.nbytes for m in (own.gate, own.up, own.down) for part in (m.weight, m.scales, m.biases)
                if part is not None) if own else 0  # fmt: skip

    def run(implementation: Callable[..., mx.array], x: mx.array) -> Results:
        return (implementation(x, made.slab, made.rows, made.shares.astype(max_type(x)), form, own),)

    def by_extension() -> Results:
        return (native.routed_experts(made.x, made.records, made.rows, made.shares, form, own),)

    return Case(
        "routed_experts",
        f"{form.bits} bit g{form.group_size} K={k}{'+1' if own else ''} T={tokens}",
        dtype,
        read,
        by_extension if on_cpu else lambda: run(expert_kernels.routed_experts, made.x),
        lambda: run(expert_kernels.by_expert, made.x),
        lambda: run(expert_kernels.reference.routed_experts, made.x.astype(mx.float64)),
    )


def dense_experts(
    geometry: Geometry, dtype: mx.Dtype, *, bits: int = 4, group_size: int = 64, experts: int = 2, seed: int = 0
) -> Case:
    """Some of the experts of a slab, in another order."""
    inputs = Inputs(dtype, seed)
    layout = RecordLayout(
        geometry.hidden, geometry.intermediate, bits, group_size, {mx.float32: "F32", mx.bfloat16: "BF16"}[dtype]
    )
    form = expert_format(layout)
    assert form is not None
    slab = inputs.slab(form, experts + 1)
    rows = mx.array(list(range(experts, 0, -1)), mx.int32)
    mx.eval(slab, rows)
    written = 3 * geometry.hidden * geometry.intermediate * dtype.size

    def exact() -> Results:
        return tuple(part.astype(mx.float64) for part in by_mlx(mx.float32))

    def by_mlx(dtype: mx.Dtype) -> Results:
        return dense_kernels.reference.dense_experts(slab, rows, form, dtype)

    return Case(
        "dense_experts",
        f"{bits} bit g{group_size} E={experts}",
        dtype,
        experts * (layout.payload_bytes + written),
        lambda: dense_kernels.dense_experts(slab, rows, form, dtype),
        lambda: by_mlx(dtype),
        exact,
    )


def grouped_experts(
    geometry: Geometry,
    dtype: mx.Dtype,
    dense: DenseExperts,
    *,
    tokens: int,
    k: int = 4,
    experts: int = 20,
    seed: int = 0,
) -> Case:
    """Many tokens, each with k of ``experts``, of which a slab holds most."""
    inputs = Inputs(dtype, seed)
    layout = RecordLayout(
        geometry.hidden, geometry.intermediate, 4, 32, {mx.float32: "F32", mx.bfloat16: "BF16"}[dtype]
    )
    form = expert_format(layout)
    assert form is not None
    slab = inputs.slab(form, experts)
    random = np.random.default_rng(seed)
    rows = np.stack([random.permutation(experts + 4)[:k] for _ in range(tokens)]).astype(np.int32)
    rows[rows >= experts] = -1
    x = inputs.normal(tokens, geometry.hidden)
    shares = mx.softmax(inputs.normal(tokens, k, dtype=mx.float32), axis=-1)
    mx.eval(slab, shares)

    def by_expert(x: mx.array, shares: mx.array) -> Results:
        return (expert_kernels.reference.routed_experts(x, slab, mx.array(rows), shares, form),)

    return Case(
        "grouped_experts",
        f"T={tokens} K={k}",
        dtype,
        experts * layout.payload_bytes,
        lambda: (grouped.grouped_experts(x, slab, rows, shares, form, dense),),
        lambda: by_expert(x, shares),
        lambda: by_expert(x.astype(mx.float64), shares.astype(mx.float64)),
    )


def max_type(x: mx.array) -> mx.Dtype:
    """The type of sums beside ``x``: f32, or f64 with f64."""
    return mx.float64 if x.dtype == mx.float64 else mx.float32


def gated_delta_net(
    geometry: Geometry, dtype: mx.Dtype, *, tokens: int = 1, seed: int = 0, on_cpu: bool = False
) -> Case:
    """A few tokens through the recurrence, after others; ``on_cpu``: by the extension for CPUs."""
    made = delta_inputs(geometry, dtype, tokens=tokens, seed=seed)
    if on_cpu:
        return _delta_case(
            made, lambda: native.gated_delta_net(*made.arrays, made.weights, made.past * 1, made.state * 1)
        )
    return _delta_case(made, lambda: delta_kernels.step(*made.arrays, made.weights, made.past, made.state))


def gated_delta_net_in_chunks(
    geometry: Geometry, dtype: mx.Dtype, *, tokens: int, rule: GatedDelta = chunked.gated_delta, seed: int = 0
) -> Case:
    """A prompt through ``rule``, after other tokens."""
    made = delta_inputs(geometry, dtype, tokens=tokens, seed=seed)
    arrays = (*made.arrays, made.weights, made.past, made.state)
    return _delta_case(made, lambda: delta_kernels.reference.gated_delta_net(*arrays, rule))


def _delta_case(made: DeltaInputs, custom: Callable[[], Results]) -> Case:
    arrays, weights, past, state = made.arrays, made.weights, made.past, made.state

    def exact() -> Results:
        wide = replace(
            weights,
            **{name: getattr(weights, name).astype(mx.float64) for name in ("convolution", "a_log", "dt_bias", "norm")},
        )
        qkv, z, b, a, old, memory = (array.astype(mx.float64) for array in (*arrays, past, state))
        return delta_kernels.reference.gated_delta_net(qkv, z, b, a, wide, old, memory)

    return Case(
        "gated_delta_net",
        f"T={len(arrays[0])}",
        arrays[0].dtype,
        2 * (state.nbytes + past.nbytes) + sum(array.nbytes for array in arrays) + weights.convolution.nbytes,
        custom,
        lambda: delta_kernels.gated_delta_net(*arrays, weights, past, state),
        exact,
    )


def attention(
    geometry: Geometry,
    dtype: mx.Dtype,
    *,
    context: int,
    tokens: int = 1,
    seed: int = 0,
    on_cpu: bool = False,
    frequencies: tuple[float, ...] | None = None,
) -> Case:
    """Tokens at the end of a filled cache of ``context`` tokens, themselves included; ``on_cpu``: by the extension."""
    made = attention_inputs(geometry, dtype, context=context, tokens=tokens, seed=seed)
    arrays, caches = made.arrays, (made.keys, made.values)
    weights = replace(made.weights, frequencies=frequencies)
    own = [cache * 1 for cache in caches]
    mx.eval(own)
    custom = native.gated_attention if on_cpu else attention_kernels.fused_gated_attention
    start = context - tokens

    def shown(y: mx.array, keys: mx.array, values: mx.array) -> Results:
        return y, keys[:, :, :context], values[:, :, :context]

    def exact() -> Results:
        wide = replace(weights, q_norm=weights.q_norm.astype(mx.float64), k_norm=weights.k_norm.astype(mx.float64))
        q_and_gate, k, v, keys, values = (array.astype(mx.float64) for array in (*arrays, *caches))
        return shown(*attention_kernels.reference.gated_attention(q_and_gate, k, v, wide, keys, values, start))

    return Case(
        "attention",
        f"context {context} T={tokens}",
        dtype,
        2 * context * geometry.kv_heads * geometry.head_dim * dtype.size,
        lambda: shown(*custom(*arrays, weights, own[0], own[1], start)),
        lambda: shown(*attention_kernels.gated_attention(*arrays, weights, caches[0] * 1, caches[1] * 1, start)),
        exact,
    )


def quantised_matvec(
    rows: int,
    columns: int,
    dtype: mx.Dtype,
    *,
    bits: int = 4,
    group_size: int = 64,
    tokens: int = 1,
    seed: int = 0,
    scales: mx.Dtype | None = None,
    on_cpu: bool = False,
) -> Case:
    """A resident matrix times a few vectors; ``scales`` and ``on_cpu`` as for ``routed_experts``."""
    inputs = Inputs(dtype, seed, scales)
    weight = inputs.quantised(rows, columns, bits, group_size)
    assert weight.scales is not None
    assert weight.biases is not None
    parts = (weight.weight, weight.scales, weight.biases)
    x = inputs.normal(tokens, columns)
    custom = native.quantised_product if on_cpu else matvec_kernels.quantised_matvec
    return Case(
        "quantised_matvec",
        f"{rows}x{columns} {bits} bit g{group_size} T={tokens}",
        dtype,
        sum(part.nbytes for part in parts),
        lambda: (custom(x, *parts, bits, group_size),),
        lambda: (matvec_kernels.by_mlx(x, *parts, bits, group_size),),
        lambda: (matvec_kernels.reference.quantised_matvec(x.astype(mx.float64), *parts, bits, group_size),),
    )
