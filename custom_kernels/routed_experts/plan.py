"""The division of work of the kernel that applies the experts of one token in one dispatch."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels.expert_format import ExpertFormat
from flashmoe_mlx.custom_kernels.nvidia import COPY_ENGINE, Gpu

_FUSED_CHUNK = 512
_WORKERS = 8
"""Simdgroups that multiply, in the kernel with one dispatch."""
_STAGERS = 6
_IN_FLIGHT = 50_000
"""Minimum number of bytes of weights that a multiprocessor requests before the first bytes arrive.

With less, memory idles; with more, threadgroups receive each other's hidden values late.
"""
_MOST_SLOTS = 12
_MOST_EXPERTS_A_PART = 8
"""Each takes four copies; a simdgroup requests 32."""
COPIES = 2


@dataclass(frozen=True)
class FusedPlan:
    """The division of work of the kernel with one dispatch.

    Attributes:
        template: values of template arguments.
        threadgroups: number of threadgroups.
        threads: threads of a threadgroup.
        shared_memory: shared memory of a threadgroup, in bytes.
    """

    template: Mapping[str, int]
    threadgroups: int
    threads: int
    shared_memory: int


def fused_plan(form: ExpertFormat, dtype: mx.Dtype, tokens: int, choices: int, device: Gpu) -> FusedPlan | None:
    """Plan one dispatch on tensor cores: a threadgroup per multiprocessor.

    Args:
        form: format of the experts.
        dtype: type of activations.
        tokens: number of tokens.
        choices: experts per token, with the shared expert.
        device: the GPU.

    Returns:
        None where two dispatches are necessary: several tokens, matrices of different formats, 3 bits, small groups,
        another type than bf16, columns that are not a multiple of a chunk, and a GPU without the copy engine or enough
        memory.
    """
    hidden, intermediate, own = form.hidden_size, form.intermediate_size, form.gate
    if (
        tokens > 1
        or device.capability < COPY_ENGINE
        or not form.gate == form.up == form.down
        or own.bits not in (2, 4, 8)
        or own.group_size not in (64, 128)
        or not dtype == own.dtype == mx.bfloat16
        or hidden % _FUSED_CHUNK
        or intermediate % _FUSED_CHUNK
        or any(offset % 16 for offset in (form.record_bytes, *form.offsets.values()))
    ):
        return None
    team = min(hidden // _FUSED_CHUNK, _WORKERS)
    teams = _WORKERS // team
    # At least two parts: most products then finish before the last hidden values arrive.
    part = min(-(-choices // 2), _MOST_EXPERTS_A_PART, max(1, hidden // intermediate))
    gap = 8 * own.bits  # between blocks of rows, to place them in different banks

    def rows_bytes(columns: int) -> int:
        """Return the bytes of 16 rows with their scales and biases."""
        return 16 * (columns * own.bits // 8 + 4 * columns // own.group_size) + 2 * gap

    up, down = rows_bytes(hidden), part * rows_bytes(intermediate)
    slot = -(-max(up, down) // 128) * 128
    products = 4 * 16 * max(hidden, part * intermediate) // _FUSED_CHUNK
    vectors = (hidden + choices * intermediate) * (2 * own.group_size + 8) // own.group_size
    rest = vectors + 8 * (2 + choices) + 8 * choices + 8
    slot_and_all = slot + products + 4 * 8 + 4
    slots = min(_MOST_SLOTS, (device.shared_memory - rest) // slot_and_all) // teams * teams
    if slots < 2:
        return None
    sizes = {"SLOT_BYTES": slot, "SLOTS": slots, "BLOCK_GAP": gap, "EXPERTS_A_PART": part, "COPIES": COPIES}
    ahead = {"AHEAD": min(slots, -(-_IN_FLIGHT // (up // 2))), "AHEAD_DOWN": min(slots, -(-_IN_FLIGHT // down))}
    simdgroups = {"TEAM": team, "TEAMS": teams, "STAGERS": _STAGERS}
    threads = 32 * (team * teams + 2 + _STAGERS)
    return FusedPlan(sizes | ahead | simdgroups, device.multiprocessors, threads, slots * slot_and_all + rest)
