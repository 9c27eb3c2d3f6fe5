"""Kernels that use the copy engine of NVIDIA GPUs equal their references on a machine that runs them on a CPU, whatever
order their threads run in and however few threadgroups run at once; and the machine notices what would hang or differ.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from cuda_on_cpu import Machine
from kernels_on_cpu import KernelFault
from systems import needs_linux

from flashmoe_mlx.custom_kernels import cases, kernel, nvidia, quantised_matvec, routed_experts
from flashmoe_mlx.custom_kernels.cases import TOLERANCE, Geometry

pytestmark = needs_linux
WHOLE_CHUNKS = Geometry(1024, 512, 6, 2, 32, 8, 2, 6, 32, 48)
GPU = nvidia.Gpu(multiprocessors=3, capability=9, shared_memory=120_000)
Run = Callable[..., None]


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Has kernels run on a machine with so many threadgroups at once and a seed."""
    for module in (kernel, routed_experts, quantised_matvec):
        monkeypatch.setattr(module, "dialect", lambda: "cuda")
    for module in (routed_experts, quantised_matvec):
        monkeypatch.setattr(module, "gpu", lambda: GPU)

    def use(at_once: int, seed: int) -> None:
        monkeypatch.setattr(mx.fast, "cuda_kernel", Machine(at_once, seed).cuda_kernel)
        kernel.compiled.cache_clear()

    return use


@pytest.mark.parametrize(
    ("bits", "group_size", "k", "shared", "at_once"),
    [(4, 64, 5, True, (3, 1)), (2, 128, 2, False, (2,)), (8, 64, 4, False, (3,))],
)
def test_routed_experts(
    bits: int, group_size: int, k: int, shared: bool, at_once: tuple[int, ...], on_machine: Run
) -> None:
    sizes = {"bits": bits, "group_size": group_size, "k": k, "shared": shared}
    case = cases.routed_experts(WHOLE_CHUNKS, mx.bfloat16, **sizes)
    for number in at_once:
        on_machine(number, seed=number)
        assert case.error() <= TOLERANCE[mx.bfloat16]
        assert not any(np.array(turns)[0, 0] for turns in routed_experts._all_turns(k * 512)), "counters are zero again"


@pytest.mark.parametrize("bits", [2, 4])
def test_quantised_matvec(bits: int, on_machine: Run) -> None:
    on_machine(3, bits)
    case = cases.quantised_matvec(16 * 13, 1024, mx.bfloat16, bits=bits, group_size=64)
    assert case.error() <= TOLERANCE[mx.bfloat16]


def planted(source: str, threadgroups: int = 1) -> None:
    run = Machine(1, 0).cuda_kernel("planted", ["x"], ["y"], source, "", 4096)
    run(
        inputs=[mx.zeros((64,), mx.uint32)],
        output_shapes=[(64,)],
        output_dtypes=[mx.uint32],
        grid=(64 * threadgroups, 1, 1),
        threadgroup=(64, 1, 1),
    )


BARRIER = """
    DYNAMIC_SHARED(memory);
    unsigned long long* barrier = (unsigned long long*)memory;
    const int mine = thread_index_in_threadgroup;
    if (mine == 0) { barrier_init(barrier, 1); }
    __syncthreads();
"""


HANDED = """
    for (int i = 0; threadgroup_position_in_grid.x == 1 && i < 4; i++) { publish((uint2*)x + i, 0, 1); }
"""


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("if (thread_index_in_threadgroup < 32) { __syncthreads(); }", "for ever"),
        ("if (thread_index_in_simdgroup < 31) { __syncwarp(); }", "for ever"),
        (HANDED + "wait_for_words((uint4*)x, 1);", "for ever"),
        (BARRIER + "if (mine < 2) { barrier_expect(barrier, 16); }", "more arrive"),
        (BARRIER + "if (mine == 0) { bring(memory + 1, (uchar*)x + 4, 16, barrier); }", "not aligned"),
        ("barrier_wait((unsigned long long*)x, 0);", "not made"),
        ("y[0] = undeclared;", "clang refuses"),
    ],
    ids=["half a threadgroup", "a lane short", "a later threadgroup", "arrivals", "alignment", "no barrier", "no C++"],
)
def test_the_machine_notices(source: str, fault: str) -> None:
    with pytest.raises(KernelFault, match=fault):
        planted(source, threadgroups=2)
