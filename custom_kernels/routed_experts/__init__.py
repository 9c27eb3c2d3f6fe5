"""The routed experts of a few tokens, and the shared one, from their records in place: in one dispatch on NVIDIA GPUs
from Hopper on, in two elsewhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import count

import mlx.core as mx

from flashmoe_mlx.custom_kernels.expert_mlp import ExpertWeights, Weight, expert_mlp
from flashmoe_mlx.custom_kernels.expert_mlp.reference import format_name
from flashmoe_mlx.custom_kernels.kernel import Kernel, dialect
from flashmoe_mlx.custom_kernels.nvidia import COPY_ENGINE, Gpu, gpu
from flashmoe_mlx.custom_kernels.routed_experts import reference
from flashmoe_mlx.custom_kernels.routed_experts.format import ExpertFormat

__all__ = [
    "MOST_TOKENS",
    "ExpertFormat",
    "by_expert",
    "code_path",
    "fits",
    "joins",
    "most_tokens",
    "reference",
    "routed_experts",
]

MOST_TOKENS = {"metal": 8, "cuda": 256}
"""With more tokens at once, an expert is better applied to all of its tokens together. Measured on an NVIDIA H200; on
Metal nobody has yet. Prompts have any length: above 8 tokens a kernel must not be compiled for their number.
"""

_CHUNK = 32
_ROWS = 4
_SIMDGROUPS = 4
_MOST_SIMDGROUPS = 12
_DEPTH = 4
"""Steps whose weights are under way at once."""
_FUSED_CHUNK = 512
_WORKERS = 8
"""Simdgroups that multiply, in the one dispatch."""
_STAGERS = 6
_UNDER_WAY = 50_000
"""Bytes of weights that a multiprocessor asks for at least before any have come. Less leaves memory idle; with more,
threadgroups learn of each other's hidden values late."""
_MOST_SLOTS = 12
_MOST_EXPERTS_A_PART = 8
"""Four copies each; a simdgroup asks for 32."""
_COPIES = 2
_SHARED_UP = [f"shared_{projection}_{part}" for projection in ("gate", "up") for part in ("weight", "scales", "biases")]
_SHARED_DOWN = [f"shared_down_{part}" for part in ("weight", "scales", "biases")]


@cache
def kernels(with_shared: bool, tensor: bool = False) -> tuple[Kernel, Kernel]:
    """The two dispatches, for routed experts alone or with a shared one; ``tensor``: on NVIDIA's tensor cores."""
    switches = {"WITH_SHARED_EXPERT": with_shared}
    gate_up = ["x", "slab", "rows", *(_SHARED_UP if with_shared else ())]
    down = ["hidden", "slab", "rows", "shares", *(_SHARED_DOWN if with_shared else ())]
    headers = ["functions", "mma", "tensor_codes"] if tensor else ["functions", "loads", "codes"]
    suffix = "_tensor" if tensor else ""
    return (
        Kernel("routed_experts", f"gate_up{suffix}", gate_up, ["hidden"], headers, switches),
        Kernel("routed_experts", f"down{suffix}", down, ["y"], headers, switches),
    )


@cache
def fused_kernel(with_shared: bool, shared_memory: int) -> Kernel:
    """The one dispatch; ``shared_memory`` in bytes."""
    return Kernel(
        "routed_experts",
        "fused",
        ["x", "slab", "rows", "shares", "turns", *(_SHARED_UP + _SHARED_DOWN if with_shared else ())],
        ["y"],
        ["functions", "mma", "copy_engine", "tensor_stream"],
        {"WITH_SHARED_EXPERT": with_shared},
        in_place=["turns"],
        shared_memory=shared_memory,
    )


def fits(form: ExpertFormat, dtype: mx.Dtype) -> bool:
    """Whether the kernels take experts of this form with activations of ``dtype``."""
    return form.bits in (2, 3, 4, 8) and dtype in (mx.float32, mx.bfloat16)


def joins(shared: ExpertWeights, form: ExpertFormat) -> bool:
    """Whether the shared expert is like the routed ones, so that the same dispatches can take it along."""
    matrices = (shared.gate, shared.up, shared.down)
    return shared.gate.weight.shape[0] == form.intermediate_size and all(
        matrix.bits == form.bits
        and matrix.group_size == form.group_size
        and matrix.scales is not None
        and matrix.scales.dtype == form.dtype
        for matrix in matrices
    )


def code_path(
    x: mx.array,
    slab: mx.array,  # noqa: ARG001  # the operation's
    rows: mx.array,  # noqa: ARG001
    shares: mx.array,
    form: ExpertFormat,
    shared: ExpertWeights | None = None,
) -> tuple[str, ...] | None:
    """Name the code path of ``routed_experts``; None if it is not made for the arguments.

    On one machine these phrases and the sizes of a model decide between one dispatch and two, on tensor cores or not.
    """
    if len(x) > most_tokens() or not fits(form, x.dtype) or not (shared is None or joins(shared, form)):
        return None
    choices = shares.shape[1] - (shared is not None)
    return (
        "one token" if len(x) == 1 else "several tokens",
        format_name(form.bits, form.group_size, form.dtype),
        f"K={choices}",
        "" if shared is None else "with the shared expert",
    )


def most_tokens() -> int:
    """Return the largest number of tokens that these kernels are made for on the default device."""
    return MOST_TOKENS.get(dialect() or "metal", 0)


def by_expert(
    x: mx.array,
    slab: mx.array,
    rows: mx.array,
    shares: mx.array,
    form: ExpertFormat,
    shared: ExpertWeights | None = None,
) -> mx.array:
    """As ``reference.routed_experts``, each expert by MLX's quantised products."""
    return reference.routed_experts(x, slab, rows, shares, form, shared, expert_mlp)


def routed_experts(
    x: mx.array,
    slab: mx.array,
    rows: mx.array,
    shares: mx.array,
    form: ExpertFormat,
    shared: ExpertWeights | None = None,
) -> mx.array:
    """As ``reference.routed_experts``, if the experts fit (``fits``) and the shared one ``joins`` them.

    Made for up to ``MOST_TOKENS`` tokens of the device; more are right, but slow.
    """
    tokens, choices = shares.shape
    template: dict[str, int | mx.Dtype] = {
        "T": x.dtype,
        "S": form.dtype,
        "HIDDEN": form.hidden_size,
        "INTERMEDIATE": form.intermediate_size,
        "BITS": form.bits,
        "GROUP": form.group_size,
        "CHOICES": choices,
        "RECORD_BYTES": form.record_bytes,
    }
    offsets = {name.replace(".", "_").upper(): offset for name, offset in form.offsets.items()}
    plan = fused_plan(form, x.dtype, tokens, choices, gpu()) if dialect() == "cuda" else None
    if plan is not None:
        own = _parts(shared.gate, shared.up, shared.down) if shared else []
        (y,) = fused_kernel(shared is not None, plan.shared_memory)(
            [x, slab, rows, shares, _turns(_COPIES * choices * form.intermediate_size), *own],
            [(x.shape, x.dtype)],
            (plan.threadgroups, 1, 1),
            plan.threads,
            {**template, **offsets, **plan.template},
        )
        return y

    up_offsets = {name: offset for name, offset in offsets.items() if not name.startswith("DOWN")}
    down_offsets = {name: offset for name, offset in offsets.items() if name.startswith("DOWN")}

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
        template | up_offsets | up_template,
    )
    (y,) = down(
        [hidden, slab, rows, shares, *(_parts(shared.down) if shared else ())],
        [(x.shape, x.dtype)],
        (form.hidden_size // down_rows, tokens, 1),
        32 * simdgroups,
        template | down_offsets | down_template,
    )
    return y


def on_tensor_cores(form: ExpertFormat, dtype: mx.Dtype) -> bool:
    """Whether the experts go through NVIDIA's tensor cores: 2 or 4 bits, everything else in bf16."""
    return (
        dialect() == "cuda"
        and form.bits in (2, 4)
        and form.group_size in (64, 128)
        and dtype == form.dtype == mx.bfloat16
        and form.hidden_size % 256 == 0
        and form.intermediate_size % 256 == 0
    )


@dataclass(frozen=True)
class FusedPlan:
    """How the one dispatch divides its work; ``shared_memory`` in bytes."""

    template: Mapping[str, int]
    threadgroups: int
    threads: int
    shared_memory: int


def fused_plan(form: ExpertFormat, dtype: mx.Dtype, tokens: int, choices: int, device: Gpu) -> FusedPlan | None:
    """The plan for one dispatch on tensor cores: a threadgroup a multiprocessor.

    None where two dispatches must do: several tokens, 3 bits, small groups, another type than bf16, columns that are no
    whole chunks, a GPU without the copy engine or without the memory.
    """
    hidden, intermediate = form.hidden_size, form.intermediate_size
    if (
        tokens > 1
        or device.capability < COPY_ENGINE
        or form.bits not in (2, 4, 8)
        or form.group_size not in (64, 128)
        or not dtype == form.dtype == mx.bfloat16
        or hidden % _FUSED_CHUNK
        or intermediate % _FUSED_CHUNK
        or any(offset % 16 for offset in (form.record_bytes, *form.offsets.values()))
    ):
        return None
    team = min(hidden // _FUSED_CHUNK, _WORKERS)
    teams = _WORKERS // team
    # Two parts or more: most products can be done before the last hidden values come.
    part = min(-(-choices // 2), _MOST_EXPERTS_A_PART, max(1, hidden // intermediate))
    gap = 8 * form.bits  # between blocks of rows, or these would lie in the same banks

    def rows_bytes(columns: int) -> int:
        """16 rows with their scales and biases."""
        return 16 * (columns * form.bits // 8 + 4 * columns // form.group_size) + 2 * gap

    up, down = rows_bytes(hidden), part * rows_bytes(intermediate)
    slot = -(-max(up, down) // 128) * 128
    products = 4 * 16 * max(hidden, part * intermediate) // _FUSED_CHUNK
    vectors = (hidden + choices * intermediate) * (2 * form.group_size + 8) // form.group_size
    others = vectors + 8 * (2 + choices) + 8 * choices + 8
    slot_and_all = slot + products + 4 * 8 + 4
    slots = min(_MOST_SLOTS, (device.shared_memory - others) // slot_and_all) // teams * teams
    if slots < 2:
        return None
    sizes = {"SLOT_BYTES": slot, "SLOTS": slots, "BLOCK_GAP": gap, "EXPERTS_A_PART": part, "COPIES": _COPIES}
    ahead = {"AHEAD": min(slots, -(-_UNDER_WAY // (up // 2))), "AHEAD_DOWN": min(slots, -(-_UNDER_WAY // down))}
    simdgroups = {"TEAM": team, "TEAMS": teams, "STAGERS": _STAGERS}
    threads = 32 * (team * teams + 2 + _STAGERS)
    return FusedPlan(sizes | ahead | simdgroups, device.multiprocessors, threads, slots * slot_and_all + others)


_calls = count()


@cache
def _all_turns(words: int) -> list[mx.array]:
    turns = mx.zeros((256, 64 + words), mx.uint32)
    rows = [turns[i : i + 1] for i in range(len(turns))]
    mx.eval(rows)
    return rows


def _turns(words: int) -> mx.array:
    """Counters and room for tagged hidden values of one call, which leaves the counters as the next one needs them.

    Calls that run at once must not have the same; of 256 in a row, none have. A function that ``mx.compile`` made keeps
    those it was made with: let it not run beside itself.
    """
    rows = _all_turns(words)
    return rows[next(_calls) % len(rows)]


def _parts(*weights: Weight) -> list[mx.array]:
    return [part for weight in weights for part in (weight.weight, weight.scales, weight.biases) if part is not None]


def _whole_simdgroups(threads: int) -> int:
    return -(-threads // 32) * 32


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
