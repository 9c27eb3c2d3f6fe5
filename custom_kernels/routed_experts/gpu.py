"""The kernels of routed experts for GPUs.

One token takes one dispatch on NVIDIA GPUs from Hopper on; everything else takes two.
"""

import threading
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import count, product

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.checks import CodePath, Sample, tokens_phrase
from flashmoe_mlx.custom_kernels.expert_format import ExpertFormat
from flashmoe_mlx.custom_kernels.kernel import Kernel, dialect
from flashmoe_mlx.custom_kernels.nvidia import gpu
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.routed_experts.plan import COPIES, FusedPlan, fused_plan
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.custom_kernels.weights import ExpertWeights, QuantizedWeight

MOST_TOKENS = {"metal": 8, "cuda": 256}
"""With more tokens, it is faster to apply each expert to all of its tokens together.

Measured on an NVIDIA H200, not yet on Metal. Prompts have any length: above 8 tokens, a kernel must not be compiled for
the number of tokens.
"""

_CHUNK = 32
_ROWS = 4
_SIMDGROUPS = 4
_MOST_SIMDGROUPS = 12
_DEPTH = 4
"""Steps whose weights are in flight at once."""
_SHARED_UP = [f"shared_{projection}_{part}" for projection in ("gate", "up") for part in ("weight", "scales", "biases")]
_SHARED_DOWN = [f"shared_down_{part}" for part in ("weight", "scales", "biases")]


@cache
def kernels(with_shared: bool, tensor: bool = False) -> tuple[Kernel, Kernel]:
    """Return the kernels of the two dispatches, with or without a shared expert, on tensor cores or not."""
    switches = {"WITH_SHARED_EXPERT": with_shared}
    gate_up = ["x", "slab", "rows", *(_SHARED_UP if with_shared else ())]
    down = ["hidden", "residual", "slab", "rows", "routing_weights", *(_SHARED_DOWN if with_shared else ())]
    headers = ["functions", "mma", "tensor_codes"] if tensor else ["functions", "loads", "codes"]
    suffix = "_tensor" if tensor else ""
    return (
        Kernel(__package__, f"gate_up{suffix}", gate_up, ["hidden"], headers, switches),
        Kernel(__package__, f"down{suffix}", down, ["y"], headers, switches),
    )


@cache
def fused_kernel(with_shared: bool, shared_memory: int, chooses: bool = False) -> Kernel:
    """Return the kernel with one dispatch.

    Args:
        with_shared: whether it applies a shared expert.
        shared_memory: shared memory of a threadgroup, in bytes.
        chooses: whether it also chooses the experts.
    """
    choice = ["scores", "table", "earlier"] if chooses else ["rows", "routing_weights"]
    own = _SHARED_UP + _SHARED_DOWN if with_shared else []
    return Kernel(
        __package__,
        "fused",
        ["x", "residual", "slab", *choice, "tickets", *own],
        ["y", *["chosen"] * chooses],
        ["functions", "mma", "copy_engine", "tensor_stream", *["choice"] * chooses],
        {"WITH_SHARED_EXPERT": with_shared, "CHOOSES": chooses},
        in_place=["tickets"],
        shared_memory=shared_memory,
    )


def supports(form: ExpertFormat, dtype: mx.Dtype) -> bool:
    """Return whether the kernels support experts of this format with activations of ``dtype``."""
    return all(own.bits in (2, 3, 4, 8) for own in form.formats) and dtype in (mx.float32, mx.bfloat16)


def can_fuse_shared_expert(shared: ExpertWeights, form: ExpertFormat) -> bool:
    """Return whether the shared expert has the formats of the routed experts, and so can join their dispatches."""
    return shared.gate.weight.shape[0] == form.intermediate_size and all(
        own.describes(matrix) for own, matrix in zip(form.formats, shared.matrices, strict=True)
    )


def code_path(
    x: mx.array,
    slab: mx.array,  # noqa: ARG001  # the signature of the operation
    rows: mx.array,  # noqa: ARG001
    routing_weights: mx.array,
    form: ExpertFormat,
    shared: ExpertWeights | None = None,
    residual: mx.array | None = None,
) -> CodePath | None:
    """Return the code path of ``routed_experts``; None if it does not support the arguments.

    On a given machine, these phrases and the sizes of a model determine the number of dispatches and whether tensor
    cores are used.
    """
    if len(x) > most_tokens() or not supports(form, x.dtype):
        return None
    if shared is not None and not can_fuse_shared_expert(shared, form):
        return None
    choices = routing_weights.shape[1] - (shared is not None)
    return (
        tokens_phrase(len(x)),
        form.name,
        f"K={choices}",
        "" if shared is None else "with the shared expert",
        "" if residual is None or residual.dtype == x.dtype else "f32 results",
    )


def most_tokens() -> int:
    """Return the largest number of tokens for which these kernels are used on the default device."""
    return MOST_TOKENS.get(dialect() or "metal", 0)


def routed_experts(
    x: mx.array,
    slab: mx.array,
    rows: mx.array,
    routing_weights: mx.array,
    form: ExpertFormat,
    shared: ExpertWeights | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """Compute ``reference.routed_experts`` for arguments with a ``code_path``.

    More than ``MOST_TOKENS`` tokens of the device give correct results, but slowly.
    """
    tokens, choices = routing_weights.shape
    added = residual if residual is not None else _no_residual(x.shape, x.dtype)
    plan = plan_of(form, x.dtype, tokens, choices)
    if plan is not None:
        (y,) = run_fused(plan, [x, added, slab, rows, routing_weights], form, choices, shared)
        return y
    template = sizes_of(form, x.dtype, choices, slab.shape[1])
    up_format, down_format = form.template_of("gate") | form.template_of("up"), form.template_of("down")
    tensor = on_tensor_cores(form, x.dtype)
    gate_up, down = kernels(shared is not None, tensor)
    if tensor:
        up_rows, up_threads = 8, 32 * _SIMDGROUPS
        up_template = {"SIMDGROUPS": _SIMDGROUPS, "DEPTH": _DEPTH}
        down_rows, simdgroups = 16, min(choices, _MOST_SIMDGROUPS)
        down_template = {"SIMDGROUPS": simdgroups, "DEPTH": _DEPTH}
    else:
        up_rows, up_threads = _ROWS, min(256, _whole_simdgroups(form.hidden_size // _CHUNK))
        up_template = {"ROWS": _ROWS, "THREADS": up_threads}
        team = min(32, max(_ROWS, _power_of_two(form.intermediate_size // _CHUNK)))
        down_rows, simdgroups = _ROWS * 32 // team, min(choices, _MOST_SIMDGROUPS)
        down_template = {"ROWS": _ROWS, "TEAM": team, "SIMDGROUPS": simdgroups}
    (hidden,) = gate_up(
        [x, slab, rows, *(_parts(shared.gate, shared.up) if shared else ())],
        [((tokens * choices, form.intermediate_size), x.dtype if tensor else mx.float32)],
        (form.intermediate_size // up_rows, tokens * choices, 1),
        up_threads,
        template | up_format | up_template,
    )
    (y,) = down(
        [hidden, added, slab, rows, routing_weights, *(_parts(shared.down) if shared else ())],
        [(x.shape, added.dtype)],
        (form.hidden_size // down_rows, tokens, 1),
        32 * simdgroups,
        template | down_format | down_template | {"RESULT": added.dtype},
    )
    return y


def plan_of(form: ExpertFormat, dtype: mx.Dtype, tokens: int, choices: int) -> FusedPlan | None:
    """Return the plan of one dispatch on the default device, or None; see ``fused_plan``."""
    return fused_plan(form, dtype, tokens, choices, gpu()) if dialect() == "cuda" else None


def run_fused(
    plan: FusedPlan,
    inputs: Sequence[mx.array],
    form: ExpertFormat,
    choices: int,
    shared: ExpertWeights | None,
    experts: int = 0,
    renormalized: bool = True,
) -> list[mx.array]:
    """Run one dispatch for one token.

    Args:
        plan: the result of ``plan_of``.
        inputs: the vector, the residual, the slab, and two arrays that determine the experts: rows and routing weights
            or, with ``experts``, scores, a table and the experts of earlier layers; see ``chosen_experts``.
        form: format of the records.
        choices: experts per token, with the shared expert.
        shared: the shared expert, or None.
        experts: number of experts to choose from; 0 where they are chosen.
        renormalized: whether the weights of the experts that it chooses sum to 1.
    """
    x, residual, slab, *_ = inputs
    template = sizes_of(form, x.dtype, choices, slab.shape[1]) | form.template()
    template |= {"BITS": form.gate.bits, "GROUP": form.gate.group_size, "RESULT": residual.dtype}
    own = _parts(shared.gate, shared.up, shared.down) if shared else []
    results = [(x.shape, residual.dtype)]
    if experts:
        results.append(((inputs[-1].size + choices - (shared is not None),), mx.int32))
        template = template | {"EXPERTS": experts, "RENORMALIZED": int(renormalized)}
    return fused_kernel(shared is not None, plan.shared_memory, experts > 0)(
        [*inputs, _tickets.next_row(COPIES * choices * form.intermediate_size), *own],
        results,
        (plan.threadgroups, 1, 1),
        plan.threads,
        {**template, **plan.template},
    )


def sizes_of(form: ExpertFormat, dtype: mx.Dtype, choices: int, row_bytes: int) -> dict[str, int | mx.Dtype]:
    """Return the template arguments of all kernels.

    Args:
        form: format of the records.
        dtype: type of activations.
        choices: experts per token, with the shared expert.
        row_bytes: size of a row of the slab, at least that of a record.
    """
    return {
        "T": dtype,
        "HIDDEN": form.hidden_size,
        "INTERMEDIATE": form.intermediate_size,
        "CHOICES": choices,
        "RECORD_BYTES": row_bytes,
    }


@lru_cache(maxsize=4)
def _no_residual(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    zeros = mx.zeros(shape, dtype)
    mx.eval(zeros)
    return zeros


def on_tensor_cores(form: ExpertFormat, dtype: mx.Dtype) -> bool:
    """Return whether experts run on NVIDIA's tensor cores: 2 or 4 bits, with scales and activations in bf16.

    Gate and up have one format.
    """
    return (
        dialect() == "cuda"
        and form.gate == form.up
        and all(own.bits in (2, 4) and own.group_size in (64, 128) for own in form.formats)
        and all(dtype == own.dtype == mx.bfloat16 for own in form.formats)
        and form.hidden_size % 256 == 0
        and form.intermediate_size % 256 == 0
    )


class _Tickets(threading.local):
    """Work counters, separate for each thread: MLX gives each thread a stream, and streams run kernels side by side."""

    def __init__(self) -> None:
        self._calls = count()
        self._rows: dict[int, list[mx.array]] = {}

    def all_rows(self, words: int) -> list[mx.array]:
        """Return the counters of this thread with room for ``words``, one array for each of 256 calls."""
        if words not in self._rows:
            tickets = mx.zeros((256, 64 + words), mx.uint32)
            rows = [tickets[i : i + 1] for i in range(len(tickets))]
            mx.eval(rows)
            self._rows[words] = rows
        return self._rows[words]

    def next_row(self, words: int) -> mx.array:
        """Return work counters for one call, and room for ``words`` of tagged hidden values.

        A call leaves the counters as the next call needs them. Calls that run at once must not share counters; 256
        calls in a row have different counters. A function made by ``mx.compile`` always uses the counters of its
        tracing, so it must not run concurrently with itself; MLX traces it again for another thread.
        """
        rows = self.all_rows(words)
        return rows[next(self._calls) % len(rows)]


_tickets = _Tickets()


def _parts(*weights: QuantizedWeight) -> list[mx.array]:
    return [part for weight in weights for part in (weight.weight, weight.scales, weight.biases) if part is not None]


def _whole_simdgroups(threads: int) -> int:
    return -(-threads // 32) * 32


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield one token and several tokens of each format, with and without the shared expert, with true sizes.

    Sums of several groups of experts, or of several nodes, begin as parts in f32.
    """
    for form in model.experts:
        if supports(form, model.dtype):
            yield from _samples_of(form, model)


def _samples_of(form: ExpertFormat, model: ModelShapes) -> Iterator[Sample]:
    inputs, k = RandomInputs(model.dtype, 0), model.experts_k
    slab = inputs.slab(form, 3)
    fused = [shared for shared in model.shared if can_fuse_shared_expert(shared, form)]
    drawn = [inputs.expert_like(shared) for shared in fused[:1]]
    several = most_tokens()
    types = list(dict.fromkeys([model.dtype, mx.float32]))
    for tokens in (1, min(several, 9)):
        rows = np.full((tokens, k), -1, np.int32)
        if tokens == 1:
            rows[0] = np.arange(k) % 3
        else:
            rows[:, 0] = np.arange(tokens) % 3
            rows[0, -1] = 1
        in_parts = model.on_nodes or model.needs_several_groups(1 if tokens == 1 else several)
        for shared, dtype in product([*drawn, None], types):
            whole = not model.on_nodes and (shared is not None or len(fused) < len(model.shared) or not model.shared)
            if not ((whole and dtype == model.dtype) or (in_parts and dtype == mx.float32)):
                continue
            x = inputs.normal(tokens, form.hidden_size)
            scores = inputs.normal(tokens, k + (shared is not None), dtype=mx.float32)
            residual = inputs.normal(tokens, form.hidden_size).astype(dtype)
            yield Sample((x, slab, mx.array(rows), mx.softmax(scores, axis=-1), form, shared, residual))
