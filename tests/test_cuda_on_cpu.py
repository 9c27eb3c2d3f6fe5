"""CUDA kernels equal their references on a machine that runs their text on a CPU, with any order of threads and any
number of concurrent threadgroups; and the machine detects kernels that hang or whose results vary. These are the
everyday counterparts of ``-m cuda`` in ``test_kernels.py`` and ``test_fill_slots.py``.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import gpu_on_cpu
import mlx.core as mx
import numpy as np
import pytest
from cuda_on_cpu import Machine
from kernels_on_cpu import KernelFault
from systems import needs_linux

from flashmoe_mlx.custom_kernels import cases as kernel_cases
from flashmoe_mlx.custom_kernels import fill_slots, kernel, nvrtc, precompiled
from flashmoe_mlx.custom_kernels.add_rows import gpu as add_rows
from flashmoe_mlx.custom_kernels.attention import gpu as attention
from flashmoe_mlx.custom_kernels.cases import GEOMETRIES, TOLERANCE, Case, Geometry
from flashmoe_mlx.custom_kernels.choose_experts import gpu as choose_experts
from flashmoe_mlx.custom_kernels.chosen_experts import gpu as chosen_experts
from flashmoe_mlx.custom_kernels.dense_experts import gpu as dense_experts
from flashmoe_mlx.custom_kernels.gather_rows import gpu as gather_rows
from flashmoe_mlx.custom_kernels.routed_experts import gpu as routed_experts
from flashmoe_mlx.custom_kernels.routed_experts.grouped import RowKernels
from flashmoe_mlx.custom_kernels.routed_experts.samples import expert_inputs
from flashmoe_mlx.moe import router
from flashmoe_mlx.stores.libc import address_of

pytestmark = needs_linux
WHOLE_CHUNKS = Geometry(1024, 512, 6, 2, 32, 8, 2, 6, 32, 48)
WHOLE_STEPS = Geometry(256, 256, 6, 2, 32, 8, 2, 6, 32, 48)
"""The smallest sizes that go through tensor cores."""
SMALL = GEOMETRIES["small"]
BF16, F32 = mx.bfloat16, mx.float32


@pytest.fixture
def on_hopper() -> Iterator[gpu_on_cpu.Launches]:
    with gpu_on_cpu.cuda() as launches:
        yield launches


@pytest.fixture
def on_ampere() -> Iterator[gpu_on_cpu.Launches]:
    with gpu_on_cpu.cuda(gpu=gpu_on_cpu.AMPERE) as launches:
        yield launches


def check(case: Case, launches: gpu_on_cpu.Launches, kernel: str) -> None:
    assert case.error() <= TOLERANCE[case.dtype]
    assert kernel in launches


@pytest.mark.parametrize(
    ("bits", "group_size", "k", "shared", "at_once"),
    [(4, 64, 5, True, (3, 1)), (2, 128, 2, False, (2,)), (8, 64, 4, False, (3,))],
)
def test_routed_experts(bits: int, group_size: int, k: int, shared: bool, at_once: tuple[int, ...]) -> None:
    sizes = {"bits": bits, "group_size": group_size, "k": k, "shared": shared}
    case = kernel_cases.routed_experts(WHOLE_CHUNKS, BF16, **sizes)
    name = "routed_experts_fused" + "_with_shared_expert" * shared
    for number in at_once:
        with gpu_on_cpu.cuda(at_once=number) as launches:
            check(case, launches, name)
            used = [np.array(row)[0] for row in routed_experts._tickets.all_rows(2 * (k + shared) * 512)]
            assert any(row[32] for row in used), "a call leaves its tag"
            assert not any(row[0] for row in used), "zero again"


def test_threads_do_not_share_work_counters() -> None:
    """Each thread of a process has its own stream in MLX, and kernels of different streams may run at once."""
    with ThreadPoolExecutor(1) as other:
        for call in (lambda: routed_experts._tickets.next_row(8), lambda: routed_experts._tickets.next_row(16)):
            mine, theirs = call(), other.submit(call).result()
            mine_at, theirs_at = (address_of(memoryview(row).cast("B")) for row in (mine, theirs))  # type: ignore[arg-type]
            assert mine_at != theirs_at


@pytest.mark.parametrize("make", [attention._on_device, fill_slots._length_as_shape, router._everyone])
def test_kept_arrays_serve_all_threads(make: Callable[[int], mx.array]) -> None:
    """MLX evaluates a lazy array only in the thread that made it."""
    with ThreadPoolExecutor(1) as other:
        kept = other.submit(make, 37).result()
    mx.eval(kept + 1)


def test_repeated_calls_of_routed_experts(on_hopper: gpu_on_cpu.Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call leaves the counters as the next call with the same counters needs them."""
    monkeypatch.setattr(routed_experts._Tickets, "next_row", lambda tickets, words: tickets.all_rows(words)[0])
    before = int(np.array(routed_experts._tickets.all_rows(2 * 2 * 512)[0])[0, 32])
    made = kernel_cases.routed_experts(WHOLE_CHUNKS, BF16, k=2, shared=False)
    first = np.array(made.custom()[0].astype(F32))
    for _ in range(3):
        assert np.array_equal(np.array(made.custom()[0].astype(F32)), first)
    assert int(np.array(routed_experts._tickets.all_rows(2 * 2 * 512)[0])[0, 32]) == before + 4


@pytest.mark.parametrize(("bits", "rows"), [(2, 208), (4, 208), (8, 16)])
def test_quantized_matvec_of_whole_chunks(bits: int, rows: int, on_hopper: gpu_on_cpu.Launches) -> None:
    case = kernel_cases.quantized_matvec(rows, 1024, BF16, bits=bits, group_size=64)
    check(case, on_hopper, "quantized_matvec_stream")


@pytest.mark.parametrize(("bits", "rows"), [(2, 208), (4, 48), (8, 16)])
def test_norm_and_residual_in_a_product(bits: int, rows: int, on_hopper: gpu_on_cpu.Launches) -> None:
    added = kernel_cases.quantized_matvec(rows, 1024, BF16, bits=bits, with_residual=True)
    check(added, on_hopper, "quantized_matvec_stream_with_residual")
    check(kernel_cases.normed_matvec(rows, 1024, BF16, bits=bits), on_hopper, "quantized_matvec_stream_with_norm")


@pytest.mark.parametrize(("k", "experts", "bits"), [(1, 33, 8), (5, 64, 4)])
def test_chosen_experts(k: int, experts: int, bits: int, on_hopper: gpu_on_cpu.Launches) -> None:
    case = kernel_cases.chosen_experts(WHOLE_CHUNKS, BF16, k=k, experts=experts, bits=bits)
    check(case, on_hopper, "routed_experts_fused_with_shared_expert_chooses")
    assert on_hopper.total() == 1


@pytest.mark.parametrize("shared", [True, False])
def test_chosen_experts_whose_weights_do_not_sum_to_1(shared: bool, on_hopper: gpu_on_cpu.Launches) -> None:
    case = kernel_cases.chosen_experts(WHOLE_CHUNKS, BF16, k=4, experts=40, shared=shared, renormalized=False)
    check(case, on_hopper, f"routed_experts_fused{'_with_shared_expert' * shared}_chooses")
    assert on_hopper.total() == 1


def test_chosen_experts_equal_experts_chosen_before(on_hopper: gpu_on_cpu.Launches) -> None:
    """In every bit: of equal scores the first wins, and -0 equals 0."""
    made = expert_inputs(WHOLE_CHUNKS, BF16, k=3)
    scores = mx.array(np.r_[np.tile([0.0, -0.0, 0.5, -3.0, np.nan], 8), np.zeros(16)][None].astype(np.float32))
    table, earlier, scores = mx.arange(40, dtype=mx.int32) % 5, mx.zeros(4, mx.int32), scores.astype(BF16)
    for k in (3, 10):
        arguments = (made.x, made.x, made.slab, scores, table, earlier, k, made.form, made.shared)
        y, chosen = chosen_experts.chosen_experts(*arguments)
        found, rows, weights = choose_experts.choose_experts(scores, table, k)
        expected = routed_experts.routed_experts(made.x, made.slab, rows, weights, made.form, made.shared, made.x)
        assert np.array_equal(np.array(chosen)[4:], np.array(found)[0])
        assert np.array_equal(np.array(y.astype(F32)), np.array(expected.astype(F32)))


def test_tensor_cores_take_two_formats(on_ampere: gpu_on_cpu.Launches) -> None:
    routed = kernel_cases.routed_experts(WHOLE_STEPS, BF16, tokens=2, k=3, bits=(2, 2, 4), group_size=(64, 64, 128))
    check(routed, on_ampere, "routed_experts_down_tensor_with_shared_expert")


@pytest.mark.parametrize(("bits", "group_size", "shared"), [(2, 64, False), (4, 128, True)])
def test_tensor_cores(bits: int, group_size: int, shared: bool, on_ampere: gpu_on_cpu.Launches) -> None:
    sizes = {"bits": bits, "group_size": group_size}
    routed = kernel_cases.routed_experts(WHOLE_STEPS, BF16, tokens=2, k=3, shared=shared, **sizes)
    check(routed, on_ampere, "routed_experts_gate_up_tensor" + "_with_shared_expert" * shared)
    case = kernel_cases.quantized_matvec(48, 256, BF16, tokens=2, with_residual=shared, **sizes)
    check(case, on_ampere, "quantized_matvec_tensor" + "_with_residual" * shared)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "rotary", "contexts"),
    [(16, 1, 128, 64, (1, 32, 33, 65, 300)), (9, 9, 256, 256, (40,))],
)
def test_attention_on_tensor_cores(
    heads: int, kv_heads: int, width: int, rotary: int, contexts: tuple[int, ...], on_hopper: gpu_on_cpu.Launches
) -> None:
    """Full, partial and single tiles."""
    geometry = Geometry(64, 32, heads, kv_heads, width, rotary, 1, 1, 32, 16)
    for context in contexts:
        case = kernel_cases.attention(geometry, BF16, context=context, seed=context)
        check(case, on_hopper, "attention_decode_tensor")
    check(kernel_cases.attention(geometry, BF16, context=40, gated=False), on_hopper, "attention_decode_tensor")


def test_more_tiles_of_a_span_than_are_in_flight(
    on_ampere: gpu_on_cpu.Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BLOCKS", 1)
    geometry = Geometry(64, 32, 4, 1, 128, 64, 1, 1, 32, 16)
    check(kernel_cases.attention(geometry, BF16, context=32 * 32 * 6 + 5), on_ampere, "attention_decode_tensor")


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_attention_with_narrow_keys_and_values(kv_bits: int, on_hopper: gpu_on_cpu.Launches) -> None:
    geometry = Geometry(64, 32, 4, 2, 64, 16, 1, 1, 32, 16)
    for tokens, name in ((1, "attention_decode"), (3, "attention_prepare")):
        check(kernel_cases.attention(geometry, F32, context=70, tokens=tokens, kv_bits=kv_bits), on_hopper, name)


BODIES = {
    "routed_experts_gate_up_with_shared_expert": partial(kernel_cases.routed_experts, SMALL, group_size=32, tokens=3),
    "routed_experts_down": partial(kernel_cases.routed_experts, SMALL, group_size=32, bits=3, shared=False),
    "dense_experts_body": partial(kernel_cases.dense_experts, SMALL, group_size=32),
    "gated_delta_net_step": partial(kernel_cases.gated_delta_net, SMALL, tokens=20),
    "attention_decode": partial(kernel_cases.attention, SMALL, context=300),
    "attention_prepare": partial(kernel_cases.attention, SMALL, context=20, tokens=9),
    "quantized_matvec_body_with_norm": partial(kernel_cases.normed_matvec, 20, 384, bits=3, group_size=32),
    "quantized_matvec_body": partial(kernel_cases.quantized_matvec, 20, 384, bits=3, group_size=32, tokens=8),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_metal_runs_as_well(name: str, on_hopper: gpu_on_cpu.Launches) -> None:
    check(BODIES[name](F32), on_hopper, name)


def test_grouped_experts_out_of_the_kernel(on_hopper: gpu_on_cpu.Launches) -> None:
    row_kernels = RowKernels(gather_rows.gather_rows, add_rows.add_rows)
    case = kernel_cases.grouped_experts(SMALL, F32, dense_experts.dense_experts, row_kernels, tokens=40, experts=18)
    for name in ("dense_experts_body", "gather_rows_body", "add_rows_body"):
        check(case, on_hopper, name)


WORDS = "".join(kernel.dialect_text(name) for name in ("cuda", "copy_engine"))


def planted(source: str, threadgroups: int = 1) -> None:
    run = Machine(1, 0).cuda_kernel("planted", ["x"], ["y"], source, WORDS, 4096)
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


def test_without_a_compiler_mlx_compiles(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> nvrtc.Compiler:
        raise nvrtc.CompilerError("libnvrtc does not load")

    def run() -> None:
        with gpu_on_cpu.cuda() as launches, monkeypatch.context() as patch:  # undone before the emulation ends
            patch.setattr(nvrtc, "compiler", refuse)
            check(kernel_cases.gated_delta_net(SMALL, F32), launches, "gated_delta_net_step")

    with pytest.raises(AssertionError):  # the warning
        run()
    assert [record.getMessage() for record in caplog.records] == [
        "kernels are compiled again in each process, which takes some seconds: libnvrtc does not load"
    ]


def test_a_kernel_that_does_not_compile_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX compiles it, and reports the error in the text."""

    def refuse(_: object, text: str, name: str, architecture: str) -> bytes:
        if name != "probe":
            raise nvrtc.CompilerError("no such architecture")
        return text.encode()

    monkeypatch.setattr(gpu_on_cpu._NoCompiler, "compile", refuse)
    with gpu_on_cpu.cuda() as launches:
        check(kernel_cases.gated_delta_net(SMALL, F32), launches, "gated_delta_net_step")


def test_kernels_compiled_together_do_not_run(on_hopper: gpu_on_cpu.Launches) -> None:
    case = kernel_cases.gated_delta_net(SMALL, F32)
    check(case, on_hopper, "gated_delta_net_step")
    on_hopper.clear()
    precompiled.compile_together(case.custom)
    assert not on_hopper
