"""Every custom kernel with random inputs, in the shapes of real models and in any other shape.

A case runs the kernel, MLX's implementation, and the reference in f64 on the same values.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.attention import cpu as attention_cpu
from flashmoe_mlx.custom_kernels.attention import gpu as attention_gpu
from flashmoe_mlx.custom_kernels.attention import mlx as attention_mlx
from flashmoe_mlx.custom_kernels.attention import reference as attention_reference
from flashmoe_mlx.custom_kernels.attention.samples import attention_inputs
from flashmoe_mlx.custom_kernels.case import TOLERANCE, Case, Results, relative_error
from flashmoe_mlx.custom_kernels.choose_experts.gpu import different_scores
from flashmoe_mlx.custom_kernels.chosen_experts import gpu as chosen_gpu
from flashmoe_mlx.custom_kernels.chosen_experts import reference as chosen_reference
from flashmoe_mlx.custom_kernels.dense_experts import gpu as dense_gpu
from flashmoe_mlx.custom_kernels.dense_experts import reference as dense_reference
from flashmoe_mlx.custom_kernels.expert_format import ExpertFormat
from flashmoe_mlx.custom_kernels.gated_delta_net import chunked
from flashmoe_mlx.custom_kernels.gated_delta_net import cpu as delta_cpu
from flashmoe_mlx.custom_kernels.gated_delta_net import gpu as delta_gpu
from flashmoe_mlx.custom_kernels.gated_delta_net import mlx as delta_mlx
from flashmoe_mlx.custom_kernels.gated_delta_net import reference as delta_reference
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import DeltaInputs, GatedDelta
from flashmoe_mlx.custom_kernels.gated_delta_net.samples import delta_inputs
from flashmoe_mlx.custom_kernels.kernel import after
from flashmoe_mlx.custom_kernels.product_cases import normed_matvec, quantized_matvec
from flashmoe_mlx.custom_kernels.random_inputs import GEOMETRIES, Geometry, RandomInputs
from flashmoe_mlx.custom_kernels.routed_experts import cpu as experts_cpu
from flashmoe_mlx.custom_kernels.routed_experts import gpu as experts_gpu
from flashmoe_mlx.custom_kernels.routed_experts import mlx as experts_mlx
from flashmoe_mlx.custom_kernels.routed_experts import reference as experts_reference
from flashmoe_mlx.custom_kernels.routed_experts.grouped import DenseExperts, RowKernels
from flashmoe_mlx.custom_kernels.routed_experts.grouped import grouped_experts as grouped
from flashmoe_mlx.custom_kernels.routed_experts.samples import expert_inputs, format_of

__all__ = [
    "GEOMETRIES",
    "TOLERANCE",
    "Case",
    "Geometry",
    "Results",
    "attention",
    "attention_inputs",
    "chosen_experts",
    "delta_inputs",
    "dense_experts",
    "expert_inputs",
    "gated_delta_net",
    "gated_delta_net_in_chunks",
    "grouped_experts",
    "normed_matvec",
    "quantized_matvec",
    "relative_error",
    "routed_experts",
]


def routed_experts(
    geometry: Geometry, dtype: mx.Dtype, *, on_cpu: bool = False, k: int = 4, tokens: int = 1, **options: Any
) -> Case:
    """Return the experts of a few tokens.

    Args:
        geometry: sizes of the experts.
        dtype: type of activations.
        on_cpu: run the kernel of the C++ extension.
        k: experts per token.
        tokens: number of tokens.
        **options: further arguments of ``expert_inputs``.
    """
    made = expert_inputs(geometry, dtype, k=k, tokens=tokens, **options)
    form, own, rows = made.form, made.shared, np.array(made.rows)
    read = len(np.unique(rows[rows >= 0])) * made.payload_bytes
    if own is not None:
        parts = (part for m in own.matrices for part in (m.weight, m.scales, m.biases))
        read += sum(part.nbytes for part in parts if part is not None)

    residual = RandomInputs(dtype, seed=1).normal(tokens, geometry.hidden)

    def run(implementation: Callable[..., mx.array], x: mx.array) -> Results:
        weights = made.routing_weights.astype(mx.float64 if x.dtype == mx.float64 else mx.float32)
        return (implementation(x, made.slab, made.rows, weights, form, own, residual.astype(x.dtype)),)

    def on_records() -> Results:
        arguments = (made.x, made.records, made.rows, made.routing_weights, form, own, residual)
        return (experts_cpu.routed_experts(*arguments),)

    return Case(
        "routed_experts",
        f"{_short(form)} K={k}{'+1' if own else ''} T={tokens}",
        dtype,
        read,
        on_records if on_cpu else lambda: run(experts_gpu.routed_experts, made.x),
        lambda: run(experts_mlx.routed_experts, made.x),
        lambda: run(experts_reference.routed_experts, made.x.astype(mx.float64)),
    )


def _short(form: ExpertFormat) -> str:
    """Return the formats of gate, up and down, each once."""
    return "/".join(dict.fromkeys(f"{own.bits} bit g{own.group_size}" for own in form.formats))


def chosen_experts(
    geometry: Geometry,
    dtype: mx.Dtype,
    *,
    k: int = 4,
    tokens: int = 1,
    experts: int = 40,
    renormalized: bool = True,
    **options: Any,
) -> Case:
    """Return the experts that scores choose.

    Args:
        geometry: sizes of the experts.
        dtype: type of activations.
        k: experts per token.
        tokens: number of tokens.
        experts: number of experts to choose from, which share a few records.
        renormalized: whether the weights of chosen experts sum to 1.
        **options: further arguments of ``expert_inputs``.
    """
    made = expert_inputs(geometry, dtype, k=k, tokens=tokens, **options)
    scores = different_scores(tokens, experts, dtype, seed=k)
    table = mx.array(np.random.default_rng(k).integers(0, len(made.slab), experts), mx.int32)
    residual = RandomInputs(dtype, seed=1).normal(tokens, geometry.hidden)
    earlier = mx.array([7, 8, 9], mx.int32)
    mx.eval(scores, table, earlier)

    def run(implementation: Callable[..., Results], wide: mx.Dtype) -> Results:
        x, added = made.x.astype(wide), residual.astype(wide)
        choice = (scores.astype(wide), table, earlier, k)
        y, chosen = implementation(x, added, made.slab, *choice, made.form, made.shared, renormalized)
        return y, chosen

    return Case(
        "chosen_experts",
        f"{made.form.gate.bits} bit K={k} of {experts} T={tokens}",
        dtype,
        k * made.payload_bytes,
        lambda: run(chosen_gpu.chosen_experts, dtype),
        lambda: run(chosen_reference.by_mlx, dtype),
        lambda: run(chosen_reference.chosen_experts, mx.float64),
    )


def dense_experts(
    geometry: Geometry,
    dtype: mx.Dtype,
    *,
    bits: int | tuple[int, int, int] = 4,
    group_size: int = 64,
    experts: int = 2,
    seed: int = 0,
) -> Case:
    """Return some of the experts of a slab, in another order.

    Args:
        geometry: sizes of the experts.
        dtype: type of scales and results.
        bits: width of a code.
        group_size: codes that share a scale and a bias.
        experts: number of experts.
        seed: seed of the random numbers.
    """
    inputs = RandomInputs(dtype, seed)
    form, payload_bytes = format_of(geometry, dtype, bits, group_size)
    slab = inputs.slab(form, experts + 1)
    rows = mx.array(list(range(experts, 0, -1)), mx.int32)
    mx.eval(slab, rows)
    written = 3 * geometry.hidden * geometry.intermediate * dtype.size

    def by_mlx(dtype: mx.Dtype) -> Results:
        return dense_reference.dense_experts(slab, rows, form, dtype)

    return Case(
        "dense_experts",
        f"{bits} bit g{group_size} E={experts}",
        dtype,
        experts * (payload_bytes + written),
        lambda: dense_gpu.dense_experts(slab, rows, form, dtype),
        lambda: by_mlx(dtype),
        lambda: tuple(part.astype(mx.float64) for part in by_mlx(mx.float32)),
    )


def grouped_experts(
    geometry: Geometry,
    dtype: mx.Dtype,
    dense: DenseExperts,
    row_kernels: RowKernels,
    *,
    tokens: int,
    k: int = 4,
    experts: int = 20,
    seed: int = 0,
) -> Case:
    """Return the experts of many tokens, where a slab holds most of the chosen experts.

    Args:
        geometry: sizes of the experts.
        dtype: type of activations and scales.
        dense: an implementation of ``dense_experts``.
        row_kernels: implementations of ``gather_rows`` and ``add_rows``.
        tokens: number of tokens.
        k: experts per token.
        experts: number of experts in the slab.
        seed: seed of the random numbers.
    """
    inputs = RandomInputs(dtype, seed)
    form, payload_bytes = format_of(geometry, dtype, 4, 32)
    slab = inputs.slab(form, experts)
    random = np.random.default_rng(seed)
    rows = np.stack([random.permutation(experts + 4)[:k] for _ in range(tokens)]).astype(np.int32)
    rows[rows >= experts] = -1
    x = inputs.normal(tokens, geometry.hidden)
    routing_weights = mx.softmax(inputs.normal(tokens, k, dtype=mx.float32), axis=-1)
    mx.eval(slab, routing_weights)

    def by_expert(x: mx.array, routing_weights: mx.array) -> Results:
        return (experts_reference.routed_experts(x, slab, mx.array(rows), routing_weights, form),)

    return Case(
        "grouped_experts",
        f"T={tokens} K={k}",
        dtype,
        experts * payload_bytes,
        lambda: (grouped(x, slab, rows, routing_weights, form, dense, row_kernels),),
        lambda: by_expert(x, routing_weights),
        lambda: by_expert(x.astype(mx.float64), routing_weights.astype(mx.float64)),
    )


def gated_delta_net(
    geometry: Geometry, dtype: mx.Dtype, *, tokens: int = 1, seed: int = 0, on_cpu: bool = False, sequences: int = 1
) -> Case:
    """Return a few tokens through the recurrence, after earlier tokens.

    Args:
        geometry: sizes of the layer.
        dtype: type of activations.
        tokens: number of tokens.
        seed: seed of the random numbers.
        on_cpu: run the kernel of the C++ extension.
        sequences: number of sequences, each with ``tokens`` tokens.
    """
    made = delta_inputs(geometry, dtype, tokens=tokens, seed=seed, sequences=sequences)

    def by_extension() -> Results:
        written = replace(made, conv_state=made.conv_state * 1, recurrent_state=made.recurrent_state * 1)
        return delta_cpu.gated_delta_net(written)

    return _delta_case(made, by_extension if on_cpu else lambda: delta_gpu.gated_delta_net(made))


def gated_delta_net_in_chunks(
    geometry: Geometry, dtype: mx.Dtype, *, tokens: int, rule: GatedDelta = chunked.gated_delta, seed: int = 0
) -> Case:
    """Return a prompt through ``rule``, after earlier tokens.

    Args:
        geometry: sizes of the layer.
        dtype: type of activations.
        tokens: number of tokens.
        rule: an implementation of ``gated_delta``.
        seed: seed of the random numbers.
    """
    made = delta_inputs(geometry, dtype, tokens=tokens, seed=seed)
    return _delta_case(made, lambda: delta_reference.gated_delta_net(made, rule))


def _delta_case(made: DeltaInputs, custom: Callable[[], Results]) -> Case:
    arrays = ("qkv", "z", "b", "a", "conv_state", "recurrent_state")

    def exact() -> Results:
        names = ("convolution", "a_log", "dt_bias", "norm")
        weights = replace(made.weights, **{name: getattr(made.weights, name).astype(mx.float64) for name in names})
        wide = {name: getattr(made, name).astype(mx.float64) for name in arrays}
        return delta_reference.gated_delta_net(replace(made, weights=weights, **wide))

    read = sum(getattr(made, name).nbytes for name in arrays) + made.weights.convolution.nbytes
    return Case(
        "gated_delta_net",
        f"T={len(made.qkv)}",
        made.qkv.dtype,
        read + made.conv_state.nbytes + made.recurrent_state.nbytes,
        custom,
        lambda: delta_mlx.gated_delta_net(made),
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
    kv_bits: int | None = None,
    gated: bool = True,
    more_starts: Sequence[int] = (),
) -> Case:
    """Return tokens at the end of a filled cache, or one token of each of several sequences.

    Args:
        geometry: sizes of the layer.
        dtype: type of activations and caches.
        context: number of tokens in the cache after the call.
        tokens: number of tokens of the call, part of ``context``.
        seed: seed of the random numbers.
        on_cpu: run the kernel of the C++ extension.
        frequencies: radians per position of each rotary pair; None for powers of theta.
        kv_bits: width of cached keys and values.
        gated: whether queries have gates.
        more_starts: the positions of the tokens of further sequences, below ``context``; only with one token.
    """
    made = attention_inputs(
        geometry,
        dtype,
        context=context,
        tokens=tokens,
        seed=seed,
        kv_bits=kv_bits,
        gated=gated,
        more_starts=more_starts,
    )
    made = replace(made, weights=replace(made.weights, frequencies=frequencies))

    def with_own_caches() -> attention_reference.AttentionInputs:
        return replace(made, keys=made.keys * 1, values=made.values * 1)

    rows, own = made.weights.rows, with_own_caches()
    mx.eval(own.keys, own.values)
    custom = attention_cpu.gated_attention if on_cpu else attention_gpu.gated_attention

    def filled(y: mx.array, keys: mx.array, values: mx.array) -> Results:
        caches = (after(y, cache[:, :, :context]) for cache in (keys, values))
        if kv_bits is None:
            return y, *caches
        return y, *(rows.unpack(cache, mx.float32) for cache in caches)

    def exact() -> Results:
        norms = {name: getattr(made.weights, name).astype(mx.float64) for name in ("q_norm", "k_norm")}
        names = ("q_and_gate", "k", "v", *(() if kv_bits else ("keys", "values")))
        wide = {name: getattr(made, name).astype(mx.float64) for name in names}
        inputs = replace(made, weights=replace(made.weights, **norms), **wide)
        return filled(*attention_reference.gated_attention(inputs))

    return Case(
        "attention",
        f"context {context} T={tokens}{f' {kv_bits} bit' if kv_bits else ''}{'' if gated else ' without gates'}",
        dtype,
        2 * context * geometry.kv_heads * rows.nbytes(dtype.size),
        lambda: filled(*custom(own)),
        lambda: filled(*attention_mlx.gated_attention(with_own_caches())),
        exact,
    )
