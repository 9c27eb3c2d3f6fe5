"""The checker runs correct kernels correctly and detects every planted fault."""

import metal_on_cpu
import mlx.core as mx
import numpy as np
import pytest
from kernels_on_cpu import KernelFault
from systems import needs_linux

pytestmark = needs_linux

HEADER = "#ifndef SHARED\n#define SHARED threadgroup\n#endif\n"
SUM = """
    SHARED float scratch[64];
    uint i = thread_index_in_threadgroup;
    scratch[i] = float(x[thread_position_in_grid.x]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint step = 32; step > 0; step /= 2) {
        if (i < step) { scratch[i] += scratch[i + step]; }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (i == 0) { y[threadgroup_position_in_grid.x] = T(scratch[0]); }
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def run(
    source: str, x: mx.array, outputs: int, threads: int = 64, groups: int = 1, header: str = HEADER
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    kernel = metal_on_cpu.metal_kernel("planted", ["x"], ["y"], source, header)
    (y,) = kernel(
        inputs=[x],
        output_shapes=[(outputs,)],
        output_dtypes=[x.dtype],
        grid=(threads * groups, 1, 1),
        threadgroup=(threads, 1, 1),
        template=[("T", x.dtype)],
    )
    return np.array(y.astype(mx.float32))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_sum_in_threadgroup_memory(dtype: mx.Dtype) -> None:
    x = mx.arange(192).astype(dtype)
    exact = np.array(x.astype(mx.float32)).reshape(3, 64).sum(1)
    np.testing.assert_allclose(run(SUM, x, 3, groups=3), exact, rtol=4e-3)


def test_bf16_is_rounded_to_the_nearest_even() -> None:
    x = mx.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-16, -1 - 2**-8] * 8)
    kernel = metal_on_cpu.metal_kernel(
        "rounding", ["x"], ["y"], "y[thread_position_in_grid.x] = bfloat16_t(x[thread_position_in_grid.x]);"
    )
    (y,) = kernel(
        inputs=[x], output_shapes=[x.shape], output_dtypes=[mx.bfloat16], grid=(32, 1, 1), threadgroup=(32, 1, 1)
    )
    assert y.tolist() == x.astype(mx.bfloat16).tolist()


def test_simdgroup_operations() -> None:
    x = mx.arange(64).astype(mx.float32)
    source = """
        uint i = thread_position_in_grid.x;
        float other = simd_shuffle_xor(float(x[i]), 5);
        y[i] = T(simd_sum(float(x[i])) + 1000.0f * simd_max(float(x[i])) + 0.001f * other + simd_broadcast(other, 3));
    """
    lanes = np.arange(64).reshape(2, 32)
    expected = lanes.sum(1, keepdims=True) + 1000 * lanes.max(1, keepdims=True) + 0.001 * (lanes ^ 5) + lanes[:, 6:7]
    np.testing.assert_allclose(run(source, x, 64), expected.reshape(-1), rtol=1e-6)


def test_shapes_are_passed_with_their_inputs() -> None:
    kernel = metal_on_cpu.metal_kernel(
        "shapes",
        ["x", "plain", "small"],
        ["y"],
        "if (thread_position_in_grid.x == 0) y[0] = x_shape[0] + 10 * x_shape[1] + 100 * small_shape[0] + plain[0];",
    )
    x, plain, small = mx.zeros((3, 2)), mx.array([5000] * 9, mx.int32), mx.zeros((7,), mx.uint8)
    (y,) = kernel(
        inputs=[x, plain, small],
        output_shapes=[(1,)],
        output_dtypes=[mx.int32],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    assert y.tolist() == [5723]


def test_vectors_and_small_inputs() -> None:
    source = """
        const device float4* four = (const device float4*)x;
        uint4 bits = *(const device uint4*)x;
        y[thread_position_in_grid.x] = four[1].y + as_type<float>(bits.w) + float(threads_per_simdgroup);
    """
    assert run(source, mx.arange(8).astype(mx.float32), 32, threads=32).tolist() == [40.0] * 32


def test_only_declared_inputs_may_be_written() -> None:
    source = "((device T*)x)[thread_position_in_grid.x] = T(7); y[thread_position_in_grid.x] = T(1);"
    x = mx.zeros((32,))
    with pytest.raises(KernelFault, match="write to the input x at byte 0"):
        run(source, x, 32, threads=32)
    assert x.tolist() == [0] * 32
    with metal_on_cpu.writable("x"):
        run(source, x, 32, threads=32)
    assert x.tolist() == [7] * 32


FAULTS = {
    "a missing barrier": (SUM.replace(BARRIER, "", 1), "race|nobody wrote"),
    "a barrier missing in a loop": (SUM[: SUM.rindex(BARRIER)] + SUM[SUM.rindex(BARRIER) + len(BARRIER) :], "race"),
    "a barrier for other memory": (SUM.replace("mem_threadgroup", "mem_device"), "race|nobody wrote"),
    "two threadgroups, one element": ("y[thread_index_in_threadgroup] = x[0];", "race: write"),
    "a read of what another wrote": (
        "uint i = thread_position_in_grid.x; y[i] = x[i]; y[i] = y[i ^ 1];",
        "race|nobody wrote",
    ),
    "a write past the end": (
        "y[thread_position_in_grid.x + 1] = x[0];",
        "out-of-bounds write of 4 bytes at byte 512 of y",
    ),
    "a read past the end": ("y[thread_position_in_grid.x] = x[thread_position_in_grid.x + 100];", "out-of-bounds read"),
    "a read before the start": (
        "y[thread_position_in_grid.x] = x[int(thread_position_in_grid.x) - 1];",
        "out-of-bounds",
    ),
    "a write past threadgroup memory": (
        "SHARED float s[32]; s[thread_index_in_threadgroup] = 1; y[thread_position_in_grid.x] = x[0];",
        "out-of-bounds write",
    ),
    "unwritten threadgroup memory": (
        "SHARED float s[64]; s[0] = x[0]; y[thread_position_in_grid.x] = s[thread_index_in_threadgroup ^ 1];",
        "race|nobody wrote",
    ),
    "an unwritten element": (
        "if (thread_position_in_grid.x != 37) { y[thread_position_in_grid.x] = x[0]; }",
        "1 elements of y are not written, first number 37",
    ),
    "a barrier that not all reach": (
        f"if (thread_index_in_threadgroup < 40) {{ {BARRIER} }} y[thread_position_in_grid.x] = x[0];",
        "divergence",
    ),
    "a simdgroup operation that not all reach": (
        "float s = 0; if (thread_index_in_simdgroup > 3) { s = simd_sum(1.0f); } y[thread_position_in_grid.x] = s;",
        "divergence",
    ),
    "different barriers": (
        (
            f"if (thread_index_in_simdgroup > 3) {{\n{BARRIER}\n}} else {{\n{BARRIER}\n}}\n"
            "y[thread_position_in_grid.x] = 1;"
        ),
        "wait at different places",
    ),
    "a misaligned vector": (
        "float4 v = *(const device float4*)(x + 1); y[thread_position_in_grid.x] = v.x + v.y * v.z + v.w;",
        "misaligned read of 16 bytes at byte 4 of x",
    ),
    "mixed address spaces": (
        "SHARED float s[64]; const device float* p = s; y[thread_position_in_grid.x] = p[0];",
        "clang refuses the kernel: .*address_space",
    ),
    "too much threadgroup memory": (
        "SHARED float s[8193]; uint i = thread_index_in_threadgroup; s[i] = x[0]; y[thread_position_in_grid.x] = s[i];",
        "32772 bytes of threadgroup memory",
    ),
}


@pytest.mark.parametrize(("source", "message"), FAULTS.values(), ids=FAULTS)
def test_planted_fault(source: str, message: str) -> None:
    outputs = 64 if "two threadgroups" in message or "race: write" in message else 128
    with pytest.raises(KernelFault, match=message):
        run(source, mx.arange(128).astype(mx.float32), outputs, groups=2)


def test_too_many_threads() -> None:
    with pytest.raises(KernelFault, match="2048 threads"):
        run("y[thread_position_in_grid.x] = x[0];", mx.ones((8,)), 2048, threads=2048)
