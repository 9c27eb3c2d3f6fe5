"""The kernel of routed experts in the C++ extension: any number of tokens, from records in the host's memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.custom_kernels.checks import CodePath, Sample
from flashmoe_mlx.custom_kernels.expert_format import PROJECTIONS, ExpertFormat
from flashmoe_mlx.custom_kernels.native.reduced import BLOCK_GROUPS, FEW, MANY, reduced
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.custom_kernels.weights import ExpertWeights


def can_fuse_shared_expert(shared: ExpertWeights) -> bool:
    """Return whether ``routed_experts`` supports this shared expert."""
    return all(native.supports_weight(matrix) for matrix in shared.matrices)


def supports(form: ExpertFormat) -> bool:
    """Return whether ``routed_experts`` supports records of this format."""
    return all(native.supports_matrix(own.bits, own.group_size, own.dtype) for own in form.formats)


def code_path(
    x: mx.array,
    records: Sequence[memoryview],  # noqa: ARG001  # the signature of the operation
    rows: mx.array,  # noqa: ARG001
    routing_weights: mx.array,  # noqa: ARG001
    form: ExpertFormat,
    shared: ExpertWeights | None = None,
    residual: mx.array | None = None,  # noqa: ARG001
    in_parts: bool = False,
    activations: str = "f32",
    in_place: bool = False,  # noqa: ARG001
) -> CodePath | None:
    """Return the code path of ``routed_experts``; None if it does not support the arguments.

    With many tokens, a single expert may still have few tokens; the path for many tokens includes this case.
    """
    if x.dtype != mx.float32 or not supports(form):
        return None
    fused = ""
    if shared is not None:
        if not can_fuse_shared_expert(shared):
            return None
        formats = dict.fromkeys(matrix.format_name for matrix in shared.matrices)
        fused = f"with a shared expert of {' and '.join(formats)}"
    if in_parts and len(x) > native.few_tokens():
        return None
    return *native.tokens_phrases(len(x), activations), form.name, fused, "in parts" if in_parts else ""


def routed_experts(
    x: mx.array,
    records: Sequence[memoryview],
    rows: mx.array,
    routing_weights: mx.array,
    form: ExpertFormat,
    shared: ExpertWeights | None = None,
    residual: mx.array | None = None,
    in_parts: bool = False,
    activations: str = "f32",
    in_place: bool = False,
) -> mx.array:
    """Compute ``reference.routed_experts`` in f32 for any number of tokens.

    Args:
        x: [T, hidden].
        records: records of experts, in place.
        rows: index in ``records`` of each expert, int32 [T, K]; -1 for a choice to skip.
        routing_weights: f32 [T, K]; [T, K + 1] with a shared expert, whose weight is the last.
        form: format of the records.
        shared: an expert for every token, or None.
        residual: [T, hidden] to add to the result, such as the outputs of an earlier group of experts; or None.
        in_parts: whether ``ExpertOutputs`` computes, one record after the other from the last to the first, as if the
            records arrived in this order; only for few tokens, without choices to skip.
        activations: type of the vectors of experts with many tokens; see ``native.ACTIVATIONS``.
        in_place: whether the result may take the memory of ``residual``, which saves a copy for each group of experts.
    """
    if in_parts:
        outputs = ExpertOutputs(x, rows.shape[1], form, shared)
        for place in reversed(range(len(records))):
            outputs.compute(records[place : place + 1], np.where(np.array(rows) == place, 0, -1).astype(np.int32))
        return outputs.sum(routing_weights, mx.zeros_like(x) if residual is None else residual)
    y = native.Output(x.shape, residual, in_place, zeros=True)
    choices, rounding = rows.shape[1], native.ACTIVATIONS.index(activations)
    layout, matrices = _layout(form), _matrices(shared)
    native.loaded().experts(
        x, len(x), list(records), layout, rows, routing_weights, choices, matrices, y.buffer, rounding
    )
    return y.array()


class ExpertOutputs:
    """The outputs of the experts of a few tokens, computed in parts and in any order.

    ``sum`` then equals ``routed_experts`` with all records at once to the last bit: the weighted outputs are added in
    the order of each token's choices, which must be the order of the records.

    Args:
        x: [T, hidden], T at most ``native.few_tokens()``.
        choices: K, the number of different experts of each token.
        form: format of the records.
        shared: an expert for every token, or None.
    """

    def __init__(self, x: mx.array, choices: int, form: ExpertFormat, shared: ExpertWeights | None) -> None:
        self._x = x
        self._choices = choices
        self._layout = _layout(form)
        self._columns = choices + (shared is not None)
        self._shared = _matrices(shared)
        self._outputs = np.empty((len(x), self._columns, form.hidden_size), np.float32)

    def compute(self, records: Sequence[memoryview], rows: npt.NDArray[np.int32]) -> None:
        """Compute the outputs of ``records``, and at the first call that of the shared expert.

        Args:
            records: records of experts, in place.
            rows: index in ``records`` of each choice, [T, K]; -1 for choices of other calls.
        """
        shared, self._shared = self._shared, None
        native.loaded().expert_outputs(
            self._x,
            len(self._x),
            list(records),
            self._layout,
            rows,
            self._choices,
            shared,
            self._columns,
            self._outputs,
        )

    def sum(self, routing_weights: mx.array, residual: mx.array) -> mx.array:
        """Return ``residual`` [T, hidden] plus the weighted outputs; the weights are those of ``routed_experts``."""
        y = native.Output(residual.shape, residual)
        tokens, columns, hidden = self._outputs.shape
        native.loaded().add_outputs(self._outputs, routing_weights, tokens, columns, hidden, y.buffer)
        return y.array()


def _layout(form: ExpertFormat) -> tuple[Any, ...]:
    """Return ``form`` as the extension takes it."""
    parts = [(f"{p}.{part}", f"{p}.scales") for p in PROJECTIONS for part in ("weight", "scales", "biases")]
    offsets = tuple([form.offsets[part if part in form.offsets else scales] for part, scales in parts])
    formats = tuple([(own.bits, own.group_size, native.SCALES[own.dtype]) for own in form.formats])
    return (form.hidden_size, form.intermediate_size, formats, offsets)


def _matrices(shared: ExpertWeights | None) -> tuple[Any, ...] | None:
    """Return the matrices of ``shared`` as the extension takes them."""
    return None if shared is None else tuple(native.matrix(matrix) for matrix in shared.matrices)


def on_records(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return ``function``, which expects a slab, with the arguments of ``routed_experts``; it copies the records."""

    def adapted(
        x: mx.array,
        records: Sequence[memoryview],
        rows: mx.array,
        routing_weights: mx.array,
        form: ExpertFormat,
        shared: ExpertWeights | None = None,
        residual: mx.array | None = None,
        in_parts: bool = False,  # noqa: ARG001
        in_place: bool = False,  # noqa: ARG001  # MLX's operations return new arrays
    ) -> mx.array:
        slab = mx.array(np.stack([np.frombuffer(record, np.uint8) for record in records]))
        y = function(x, slab, rows, routing_weights, form, shared)
        return y if residual is None else residual + y

    return adapted


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield one token, few and many tokens, of each format of experts, with and without each
    shared expert; few tokens also in parts.
    """
    if model.dtype == mx.float32:
        for form in model.experts:
            if supports(form):
                yield from _samples_of(form, model)


def _samples_of(form: ExpertFormat, model: ModelShapes) -> Iterator[Sample]:
    inputs, form = RandomInputs(model.dtype, 0), _reduced_format(form)
    records = [memoryview(inputs.record(form).data) for _ in range(2)]
    fused = [shared for shared in model.shared if can_fuse_shared_expert(shared)]
    drawn = [_reduced_expert(inputs, shared, form.hidden_size) for shared in fused]
    for tokens, most in ((1, 1), (FEW, native.few_tokens()), (MANY, None)):
        alone = model.on_nodes or len(fused) < len(model.shared) or model.needs_several_groups(most)
        for shared in [*drawn, *([None] if alone or not model.shared else [])]:
            for in_parts in (False, True) if tokens != MANY else (False,):
                yield _sample(inputs, form, records, tokens, shared, in_parts)


def _sample(
    inputs: RandomInputs,
    form: ExpertFormat,
    records: list[memoryview],
    tokens: int,
    shared: ExpertWeights | None,
    in_parts: bool,
) -> Sample:
    """Return a sample whose tokens all use one expert, and some of them a second; in parts, all tokens use both."""
    rows = np.full((tokens, 2 if in_parts else 3), 0 if in_parts else -1, np.int32)
    rows[:, 1] = 1
    # Their number is not a multiple of any block.
    second = slice(0, 1) if tokens == 1 else slice(0, 2) if tokens == FEW else slice(10, 29)
    rows[second, 0] = 0
    x, residual = (inputs.normal(tokens, form.hidden_size) for _ in range(2))
    weights = mx.softmax(inputs.normal(tokens, rows.shape[1] + (shared is not None)), axis=-1)
    compared = mx.array(sorted({second.start, tokens - 1}))
    arguments = (x, records, mx.array(rows), weights, form, shared, residual, in_parts)
    expected = (
        x[compared],
        records,
        mx.array(rows)[compared],
        weights[compared],
        form,
        shared,
        residual[compared],
    )
    return Sample(arguments, expected, lambda results: [results[0][compared]])


def _reduced_format(form: ExpertFormat) -> ExpertFormat:
    """Return ``form`` with the smallest sizes that have a whole block and the remainder of a row."""
    block, inner = (
        BLOCK_GROUPS * max(own.group_size for own in formats) for formats in (form.formats[:2], [form.down])
    )
    return form.resized(reduced(form.hidden_size, block), reduced(form.intermediate_size, inner))


def _reduced_expert(inputs: RandomInputs, expert: ExpertWeights, hidden_size: int) -> ExpertWeights:
    """Draw an expert in the format of ``expert``, with inputs of ``hidden_size``."""
    assert expert.down.group_size is not None
    inner = reduced(len(expert.gate.weight), BLOCK_GROUPS * expert.down.group_size)
    return ExpertWeights(
        inputs.like(expert.gate, inner, hidden_size),
        inputs.like(expert.up, inner, hidden_size),
        inputs.like(expert.down, hidden_size, inner),
    )
