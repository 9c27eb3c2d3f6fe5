"""The operations that the C++ extension implements: the code path of every call, and samples for each path.

Samples have true widths and formats but fewer rows, heads or columns than the model where only more of the same work
would follow: matrices keep a whole block of the kernels' loops and the remainder of the true size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import attention, gated_delta_net, native, quantised_matvec, routed_experts
from flashmoe_mlx.custom_kernels.attention.reference import AttentionWeights
from flashmoe_mlx.custom_kernels.expert_mlp.reference import ExpertWeights, Weight, format_name
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import DeltaWeights
from flashmoe_mlx.custom_kernels.inputs import Geometry, Inputs, attention_inputs, delta_inputs
from flashmoe_mlx.custom_kernels.operation import CodePath, Operation, Sample
from flashmoe_mlx.custom_kernels.quantised_matvec import one_by_one
from flashmoe_mlx.custom_kernels.routed_experts.format import ExpertFormat
from flashmoe_mlx.custom_kernels.shapes import ModelShapes, Projection

_FEW = 7
"""Tokens of a sample below the switch: passes over the codes with 4, 2 and 1 vectors."""
_MANY = 115
"""Tokens of a sample above it: tiles of 64 and of 48, then 3 tokens that are few again."""
_ACROSS_TILES = 67
_BLOCK_GROUPS = 16
"""Groups of a row that a kernel's inner loop takes at once; see ``formats.hpp``."""
_ROWS = 48
"""Rows of a sample's matrix besides the remainder: whole blocks of 8 and of 24 rows."""


def operations() -> dict[str, Operation[Any, Any]]:
    """Make the operations with kernels of the extension, by name."""
    everything = (
        Operation(
            name="attention",
            reference=attention.reference.gated_attention,
            mlx=attention.gated_attention,
            custom=native.gated_attention,
            path=attention_path,
            code_paths=_attention_samples,
        ),
        Operation(
            name="gated_delta_net",
            reference=gated_delta_net.reference.gated_delta_net,
            mlx=gated_delta_net.in_chunks,
            custom=native.gated_delta_net,
            path=delta_path,
            code_paths=_delta_samples,
        ),
        Operation(
            name="routed_experts",
            reference=on_slab(routed_experts.reference.routed_experts),
            mlx=on_slab(routed_experts.by_expert),
            custom=native.routed_experts,
            path=experts_path,
            code_paths=_expert_samples,
        ),
        Operation(
            name="quantised_matvec",
            reference=one_by_one(quantised_matvec.reference.quantised_matvec),
            mlx=one_by_one(quantised_matvec.by_mlx),
            custom=native.quantised_products,
            path=products_path,
            code_paths=_products_samples,
        ),
        Operation(
            name="rms_norm",
            reference=mx.fast.rms_norm,
            mlx=mx.fast.rms_norm,
            custom=native.rms_norm,
            path=norm_path,
            code_paths=_norm_samples,
        ),
    )
    for operation in everything:
        operation.maker, operation.built_for = "native kernel", native.description()
    return {operation.name: operation for operation in everything}


def norm_path(x: mx.array, weight: mx.array, eps: float) -> CodePath | None:  # noqa: ARG001  # the operation's
    """Name the code path of ``native.rms_norm``; None if it does not take the arguments."""
    return (_one_or_several(len(x)),) if x.ndim == 2 and x.dtype == weight.dtype == mx.float32 else None


def products_path(x: mx.array, weights: Sequence[Weight], before: mx.array | None = None) -> CodePath | None:
    """Name the code path of ``native.quantised_products``; None if it does not take the arguments."""
    if x.dtype != mx.float32 or not all(native.takes_weight(one) for one in weights):
        return None
    how = "added to a residual" if before is not None else "one matrix" if len(weights) == 1 else "several matrices"
    return tokens_phrase(len(x)), " and ".join(dict.fromkeys(one.format_name for one in weights)), how


def experts_path(
    x: mx.array,
    records: Sequence[memoryview],  # noqa: ARG001  # the operation's
    rows: mx.array,  # noqa: ARG001
    shares: mx.array,  # noqa: ARG001
    form: ExpertFormat,
    shared: ExpertWeights | None = None,
    before: mx.array | None = None,  # noqa: ARG001
) -> CodePath | None:
    """Name the code path of ``native.routed_experts``; None if it does not take the arguments.

    Above the switch an expert may still have few tokens: that path comprises both.
    """
    if x.dtype != mx.float32 or not native.takes_matrix(form.bits, form.group_size, form.dtype):
        return None
    joined = ""
    if shared is not None:
        if not native.joins(shared):
            return None
        forms = dict.fromkeys((shared.gate.format_name, shared.down.format_name))
        joined = f"with a shared expert of {' and '.join(forms)}"
    return tokens_phrase(len(x)), format_name(form.bits, form.group_size, form.dtype), joined


def delta_path(
    qkv: mx.array,
    z: mx.array,  # noqa: ARG001  # the operation's
    b: mx.array,  # noqa: ARG001
    a: mx.array,  # noqa: ARG001
    weights: DeltaWeights,
    past: mx.array,  # noqa: ARG001
    state: mx.array,  # noqa: ARG001
) -> CodePath | None:
    """Name the code path of ``native.gated_delta_net``; None if it does not take the arguments."""
    fit = weights.key_dim % native.LANES == 0 and weights.value_dim % native.LANES == 0
    return (_one_or_several(len(qkv)),) if fit and qkv.dtype == mx.float32 else None


def attention_path(
    q_and_gate: mx.array,
    k: mx.array,  # noqa: ARG001  # the operation's
    v: mx.array,  # noqa: ARG001
    weights: AttentionWeights,
    keys: mx.array,  # noqa: ARG001
    values: mx.array,  # noqa: ARG001
    start: int,  # noqa: ARG001
) -> CodePath | None:
    """Name the code path of ``native.gated_attention``; None if it does not take the arguments."""
    fit = weights.head_dim % native.LANES == 0 and q_and_gate.dtype == mx.float32
    return (_one_or_several(len(q_and_gate)),) if fit else None


def tokens_phrase(tokens: int) -> str:
    """Name the path that products take for this number of vectors."""
    few = native.few_tokens()
    return "one token" if tokens == 1 else f"2 to {few} tokens" if tokens <= few else f"more than {few} tokens"


def _one_or_several(tokens: int) -> str:
    return "one token" if tokens == 1 else "several tokens"


def on_slab(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Give ``function``, made for a slab, the arguments of ``native.routed_experts``; copies the records."""

    def adapted(
        x: mx.array,
        records: Sequence[memoryview],
        rows: mx.array,
        shares: mx.array,
        form: ExpertFormat,
        shared: ExpertWeights | None = None,
        before: mx.array | None = None,
    ) -> mx.array:
        slab = mx.array(np.stack([np.frombuffer(record, np.uint8) for record in records]))
        y = function(x, slab, rows, shares, form, shared)
        return y if before is None else before + y

    return adapted


def _norm_samples(model: ModelShapes) -> Iterator[Sample]:
    inputs = Inputs(mx.float32, 0)
    weight = inputs.normal(model.hidden_size)
    for tokens in (1, _FEW):
        arguments = (inputs.normal(tokens, model.hidden_size), weight, 1e-6)
        if norm_path(*arguments) is not None and model.dtype == mx.float32:
            yield Sample(arguments, arguments)


def _products_samples(model: ModelShapes) -> Iterator[Sample]:
    """For every path the first call of the model that takes it, with few rows of true length."""
    inputs, seen = Inputs(model.dtype, 0), set[CodePath | None]([None])
    for projection in model.projections:
        drawn: tuple[Weight, ...] | None = None
        for tokens in (1, _FEW, _MANY):
            columns = projection.weights[0].columns
            path = products_path(
                mx.zeros((tokens, columns), model.dtype),
                projection.weights,
                mx.zeros(1) if projection.residual else None,
            )
            if path in seen:
                continue
            seen.add(path)
            drawn = drawn or tuple(inputs.like(one, _reduced(len(one.weight), _ROWS)) for one in projection.weights)
            yield _products_sample(inputs, projection, drawn, tokens, columns)


def _products_sample(
    inputs: Inputs, projection: Projection, weights: tuple[Weight, ...], tokens: int, columns: int
) -> Sample:
    x = inputs.normal(tokens, columns)
    before = inputs.normal(tokens, len(weights[0].weight)) if projection.residual else None
    shown = _ends(tokens)
    expected = (x[shown], weights, None if before is None else before[shown])
    return Sample((x, weights, before), expected, lambda results: [y[shown] for y in results])


def _expert_samples(model: ModelShapes) -> Iterator[Sample]:
    if model.experts is None or model.dtype != mx.float32:
        return
    if not native.takes_matrix(model.experts.bits, model.experts.group_size, model.experts.dtype):
        return
    inputs, form = Inputs(model.dtype, 0), _small_form(model.experts)
    records = [memoryview(inputs.record(form).data) for _ in range(2)]
    joined = [shared for shared in model.shared if native.joins(shared)]
    drawn = [_small_expert(inputs, shared, form.hidden_size) for shared in joined]
    for tokens, most in ((1, 1), (_FEW, native.few_tokens()), (_MANY, None)):
        alone = len(joined) < len(model.shared) or model.in_several_groups(most)
        for shared in [*drawn, *([None] if alone else [])]:
            yield _expert_sample(inputs, form, records, tokens, shared)


def _expert_sample(
    inputs: Inputs, form: ExpertFormat, records: list[memoryview], tokens: int, shared: ExpertWeights | None
) -> Sample:
    """All tokens use one expert, some of them another: as many as are no multiple of anything."""
    rows = np.full((tokens, 3), -1, np.int32)
    rows[:, 1] = 1
    second = slice(0, 1) if tokens == 1 else slice(0, 2) if tokens == _FEW else slice(10, 29)
    rows[second, 0] = 0
    x, before = (inputs.normal(tokens, form.hidden_size) for _ in range(2))
    shares = mx.softmax(inputs.normal(tokens, 3 + (shared is not None)), axis=-1)
    shown = mx.array(sorted({second.start, tokens - 1}))
    arguments = (x, records, mx.array(rows), shares, form, shared, before)
    expected = (x[shown], records, mx.array(rows)[shown], shares[shown], form, shared, before[shown])
    return Sample(arguments, expected, lambda results: [results[0][shown]])


def _small_form(form: ExpertFormat) -> ExpertFormat:
    """Give ``form`` the smallest sizes that lead through a whole block and the remainder of a row."""
    block = _BLOCK_GROUPS * form.group_size
    return form.resized(_reduced(form.hidden_size, block), _reduced(form.intermediate_size, block))


def _small_expert(inputs: Inputs, expert: ExpertWeights, hidden_size: int) -> ExpertWeights:
    """Draw an expert in the format of ``expert``, with inputs of ``hidden_size``."""
    assert expert.down.group_size is not None
    inner = _reduced(len(expert.gate.weight), _BLOCK_GROUPS * expert.down.group_size)

    def drawn(weight: Weight, rows: int, columns: int) -> Weight:
        assert weight.scales is not None
        assert weight.bits is not None
        assert weight.group_size is not None
        own = Inputs(inputs.dtype, rows, weight.scales.dtype)
        return own.quantised(rows, columns, weight.bits, weight.group_size)

    return ExpertWeights(
        drawn(expert.gate, inner, hidden_size),
        drawn(expert.up, inner, hidden_size),
        drawn(expert.down, hidden_size, inner),
    )


def _delta_samples(model: ModelShapes) -> Iterator[Sample]:
    """Two key heads and their value heads: heads are independent of each other."""
    for weights in model.delta[:1]:
        each = weights.value_heads // weights.key_heads
        heads = min(2, weights.key_heads)
        geometry = Geometry(0, 0, 0, 0, 0, 0, heads, heads * each, weights.key_dim, weights.value_dim)
        for tokens in (1, _ACROSS_TILES):
            made = delta_inputs(geometry, model.dtype, tokens=tokens, taps=weights.taps, eps=weights.eps)
            if delta_path(*made.arrays, made.weights, made.past, made.state) is not None:
                written = [mx.array(np.array(part)) for part in (made.past, made.state)]
                yield Sample(
                    (*made.arrays, made.weights, *written), (*made.arrays, made.weights, made.past, made.state)
                )


def _attention_samples(model: ModelShapes) -> Iterator[Sample]:
    """Two kv heads, each with few query heads: one token over several spans of keys, many over a tile's end."""
    for weights in model.attention[:1]:
        group = weights.heads // weights.kv_heads
        kv_heads, group = min(2, weights.kv_heads), _reduced(group, 8)
        geometry = Geometry(0, 0, kv_heads * group, kv_heads, weights.head_dim, weights.rotary_dim, 0, 0, 0, 0)
        for tokens, start in ((1, 300), (_ACROSS_TILES, 5)):
            made = attention_inputs(
                geometry, model.dtype, context=start + tokens, tokens=tokens, theta=weights.theta, eps=weights.eps
            )
            # Whatever else a layer has, such as its rotary embedding, stays as it is.
            drawn = made.weights
            own = replace(weights, heads=drawn.heads, kv_heads=kv_heads, q_norm=drawn.q_norm, k_norm=drawn.k_norm)
            if attention_path(*made.arrays, own, made.keys, made.values, start) is not None:
                written = [mx.array(np.array(part)) for part in (made.keys, made.values)]
                yield Sample((*made.arrays, own, *written, start), (*made.arrays, own, made.keys, made.values, start))


def _reduced(size: int, block: int) -> int:
    """Shorten ``size`` to one ``block`` and the same remainder."""
    return size if size <= block else block + size % block


def _ends(tokens: int) -> mx.array:
    """Tokens at the ends of tiles, whose results are compared."""
    return mx.array(sorted({0, min(63, tokens - 1), min(64, tokens - 1), max(0, tokens - 4), tokens - 1}))
