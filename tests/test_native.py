"""The extension for CPUs: every kernel equals its reference in f64 on every instruction set that this machine has;
threads, forks, bad arguments; and the choice of it.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

import flashmoe_mlx
from flashmoe_mlx.custom_kernels import choose, native
from flashmoe_mlx.custom_kernels import cases as kernel_cases
from flashmoe_mlx.custom_kernels.cases import GEOMETRIES, TOLERANCE, Case, Geometry

SMALL = GEOMETRIES["small"]
ODD = Geometry(160, 288, 5, 1, 80, 20, 1, 3, 48, 16)
"""Sizes that no model has: rows that end within a block and within a chunk, five heads a key."""
F32 = mx.float32


EXTENSION = native.extension()
assert EXTENSION is not None, "the extension is not built; pip install -v . says why"


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    assert EXTENSION is not None
    return EXTENSION


@pytest.fixture(params=EXTENSION.instruction_sets())
def instructions(request: pytest.FixtureRequest, extension: ModuleType) -> Iterator[str]:
    """Every instruction set of this machine in turn; those of others are tested there."""
    before = extension.instruction_set()
    extension.use_instruction_set(request.param)
    yield request.param
    extension.use_instruction_set(before)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, extension: ModuleType) -> Iterator[int]:
    before = extension.threads()
    extension.use_threads(request.param)
    yield request.param
    extension.use_threads(before)


def check(case: Case) -> None:
    assert case.error() <= TOLERANCE[F32]


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("scales", [mx.float32, mx.bfloat16, mx.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("group_size", native.GROUP_SIZES)
@pytest.mark.parametrize("bits", native.BITS)
def test_products_of_every_format(bits: int, group_size: int, scales: mx.Dtype) -> None:
    for columns in (group_size, 3 * group_size, 19 * group_size):
        for tokens in (1, 2, 7, 9):
            check(
                kernel_cases.quantised_matvec(
                    29, columns, F32, bits=bits, group_size=group_size, tokens=tokens, scales=scales, on_cpu=True
                )
            )


@pytest.mark.usefixtures("instructions", "threads")
@pytest.mark.parametrize("tokens", [1, 3, 4, 8, 16, 18, 33, 64, 65, 130])
def test_products_of_several_vectors(tokens: int) -> None:
    check(kernel_cases.quantised_matvec(301, 1088, F32, tokens=tokens, scales=mx.bfloat16, on_cpu=True))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (2, 32), (3, 32), (8, 32)])
def test_routed_experts_of_every_width(bits: int, group_size: int, shared: bool) -> None:
    for tokens, k in ((1, 3), (2, 2), (11, 2)):
        check(
            kernel_cases.routed_experts(
                ODD, F32, bits=bits, group_size=group_size, tokens=tokens, k=k, shared=shared, on_cpu=True
            )
        )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 20), (3, 2), (8, 5), (40, 3), (150, 2)])
def test_routed_experts_of_several_tokens(tokens: int, k: int) -> None:
    check(
        kernel_cases.routed_experts(
            SMALL, F32, group_size=32, tokens=tokens, k=k, scales=mx.bfloat16, seed=tokens, on_cpu=True
        )
    )


def test_routed_experts_add_to_what_is_there_and_a_shared_expert_may_differ() -> None:
    """Groups of experts come one after the other, and a 2-bit variant keeps its shared expert at 4 bits."""
    two, four = (kernel_cases.expert_inputs(SMALL, F32, bits=bits, group_size=32, tokens=5, k=2) for bits in (2, 4))
    before = mx.random.normal(two.x.shape)
    got = native.routed_experts(two.x, two.records, two.rows, two.shares, two.form, four.shared, before)
    expected = choose("reference").routed_experts(two.x, two.slab, two.rows, two.shares, two.form, four.shared)
    assert kernel_cases.relative_error(got, (before + expected).astype(mx.float64, stream=mx.cpu)) < 1e-5


@pytest.mark.usefixtures("instructions", "threads")
@pytest.mark.parametrize("tokens", [1, 2, 7, 70])
@pytest.mark.parametrize("geometry", [SMALL, ODD], ids=["small", "odd"])
def test_gated_delta_net(geometry: Geometry, tokens: int) -> None:
    check(kernel_cases.gated_delta_net(geometry, F32, tokens=tokens, on_cpu=True))


@pytest.mark.usefixtures("instructions", "threads")
@pytest.mark.parametrize(("context", "tokens"), [(1, 1), (2, 1), (63, 1), (600, 1), (9, 9), (300, 5), (150, 70)])
@pytest.mark.parametrize("geometry", [SMALL, ODD], ids=["small", "odd"])
def test_attention(geometry: Geometry, context: int, tokens: int) -> None:
    check(kernel_cases.attention(geometry, F32, context=context, tokens=tokens, on_cpu=True))


def test_a_far_position_is_rotated_exactly() -> None:
    check(kernel_cases.attention(Geometry(64, 32, 1, 1, 32, 8, 1, 1, 32, 16), F32, context=100_000, on_cpu=True))


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "small"])
@pytest.mark.parametrize(
    "make",
    [
        partial(kernel_cases.routed_experts, k=2, scales=mx.bfloat16),
        kernel_cases.gated_delta_net,
        partial(kernel_cases.attention, context=700),
    ],
    ids=["routed_experts", "gated_delta_net", "attention"],
)
def test_shapes_of_published_models(make: Callable[..., Case], name: str) -> None:
    check(make(GEOMETRIES[name], F32, on_cpu=True))


def test_instruction_sets_agree_to_the_last_bits(extension: ModuleType) -> None:
    """Sums are taken in one order by all; but portable code rounds products before it adds, and VNNI sums integers."""
    inputs = kernel_cases.expert_inputs(SMALL, F32, bits=4, group_size=32, tokens=12, k=2)
    results = {}
    for name in extension.instruction_sets():
        extension.use_instruction_set(name)
        results[name] = np.array(
            native.routed_experts(inputs.x, inputs.records, inputs.rows, inputs.shares, inputs.form, inputs.shared)
        )
    extension.use_instruction_set("auto")
    others = [results.pop(name) for name in ("portable", "avx512_vnni") if name in results]
    fused = list(results.values())
    for result in fused[1:]:
        np.testing.assert_allclose(result, fused[0], rtol=1e-6, atol=1e-7)
    for result in others:
        np.testing.assert_allclose(result, (fused or others)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("bits", native.BITS)
def test_vectors_of_any_magnitude(bits: int) -> None:
    """One value far above the others of its group, groups of very different sizes, of zeros, of next to nothing."""
    random = np.random.default_rng(bits)
    x = random.standard_normal((1, 640), np.float32)
    x[0, 70] = 1e5
    x[0, 128:256] *= 1e-20
    x[0, 256:320] = 0
    x[0, 320:448] *= 1e-36
    x[0, 448:512] = np.float32(1e34) * np.sign(x[0, 448:512])
    weight = mx.array(random.integers(0, 2**32, (7, 640 * bits // 32), np.uint32))
    scales, biases = (mx.array(random.standard_normal((7, 10), np.float32) * 1e-3) for _ in range(2))
    dense = np.array(mx.dequantize(weight, scales, biases, group_size=64, bits=bits), np.float64)
    for end in (640, 448, 128, 64):
        x[0, end:] = 0
        got = np.array(native.quantised_product(mx.array(x), weight, scales, biases, bits, 64))
        np.testing.assert_allclose(got[0], dense @ x[0].astype(np.float64), atol=1e-6 * np.abs(dense * x).sum(-1).max())


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_does_not_become_one(value: float) -> None:
    x = np.ones((1, 192), np.float32)
    x[0, 100] = value
    weight = mx.array(np.random.default_rng(0).integers(0, 2**32, (5, 24), np.uint32))
    got = native.quantised_product(mx.array(x), weight, mx.ones((5, 3)), mx.zeros((5, 3)), 4, 64)
    assert not np.isfinite(np.array(got)).any()


def test_many_threads_at_once(extension: ModuleType) -> None:
    """Whoever finds the pool busy computes alone: all are right."""
    extension.use_threads(4)
    case = kernel_cases.quantised_matvec(600, 1024, F32, scales=mx.bfloat16, on_cpu=True)
    expected = np.array(case.custom()[0])
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: np.array(case.custom()[0]), range(400)):
            np.testing.assert_array_equal(result, expected)
    extension.use_threads(native.usable_cores())


def test_a_forked_process_has_threads_of_its_own() -> None:
    script = """
import os, sys
import numpy as np
from flashmoe_mlx.custom_kernels.native import _native as n
n.use_threads(3)
random = np.random.default_rng(0)
codes = random.integers(0, 2**32, (512, 128), np.uint32)
scales = random.standard_normal((512, 16)).astype(np.float32)
x, y = random.standard_normal((1, 1024)).astype(np.float32), np.empty((1, 512), np.float32)
def run():
    for _ in range(50):
        n.products(x, 1, ((codes, scales, scales, 512, 1024, 4, 64, 0),), (y,), False)
    return y.copy()
expected = run()
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(run(), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(run(), expected)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


MATRIX = (np.zeros((8, 8), np.uint32), np.zeros((8, 1), np.float32), np.zeros((8, 1), np.float32), 8, 64, 4, 64, 0)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (5, 5, "bits must be"),
        (6, 48, "group size must be"),
        (7, 3, "scales must be"),
        (4, 96, "whole groups"),
        (3, 9, "weight: 256 bytes, but 288 are needed"),
        (3, -1, "out of range"),
        (1, np.zeros(7, np.float32), "scales: 28 bytes, but 32 are needed"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(extension: ModuleType, place: int, value: object, message: str) -> None:
    matrix = (*MATRIX[:place], value, *MATRIX[place + 1 :])
    with pytest.raises(ValueError, match=message):
        extension.products(np.zeros(64 * 9, np.float32), 1, (matrix,), (np.zeros(64, np.float32),), False)


def test_results_must_be_writable_and_contiguous(extension: ModuleType) -> None:
    x = np.zeros(64, np.float32)
    with pytest.raises((BufferError, ValueError)):
        extension.products(x, 1, (MATRIX,), (bytes(32),), False)
    with pytest.raises((BufferError, ValueError)):
        extension.products(x, 1, (MATRIX,), (np.zeros((8, 2), np.float32)[:, 0],), False)


def test_an_input_with_gaps_is_read_as_it_means() -> None:
    case = kernel_cases.quantised_matvec(40, 128, F32, tokens=3, on_cpu=True)
    weight = mx.array(np.random.default_rng(0).integers(0, 2**32, (40, 16), np.uint32))
    scales = mx.random.normal((40, 2))
    x = mx.random.normal((128, 3)).T
    got = native.quantised_product(x, weight, scales, scales, 4, 64)
    np.testing.assert_allclose(
        got, mx.quantized_matmul(x, weight, scales, scales, group_size=64, bits=4), rtol=1e-4, atol=1e-4
    )
    check(case)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FLASHMOE_THREADS": "3", "FLASHMOE_INSTRUCTIONS": "portable"}, "portable, 3 threads"),
        ({"FLASHMOE_THREADS": "none"}, "must be a whole number"),
        ({"FLASHMOE_INSTRUCTIONS": "sse9"}, "this machine has"),
    ],
)
def test_environment_variables(variables: dict[str, str], expected: str) -> None:
    script = "from flashmoe_mlx.custom_kernels import native; print(native.description())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **variables}
    )
    assert expected in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 2),
        ("0::/a\n", {"a/cpu.max": "50000 100000"}, 1),
        ("0::/\n", {}, None),
        (
            "4:cpu,cpuacct:/d\n",
            {"cpu,cpuacct/d/cpu.cfs_quota_us": "300000", "cpu,cpuacct/d/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("4:cpu:/d\n", {"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_quotas_of_control_groups(membership: str, files: dict[str, str], cores: int | None, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert native._quota(tmp_path / "cgroup", tmp_path / "root") == cores


def test_quota_where_there_are_no_control_groups(tmp_path: Path) -> None:
    assert native._quota(tmp_path / "none", tmp_path) is None


def test_the_record_of_a_run_names_what_ran(tiny_pack: Path) -> None:
    with flashmoe_mlx.load(tiny_pack) as engine:
        engine.logits(list(range(30)))
        names = engine.setup["kernels"]
    for operation in (
        "attention",
        "gated_delta_net",
        "gated_delta_net of prompts",
        "routed_experts",
        "quantised_matvec",
    ):
        assert names[operation].startswith("native kernel ")
    assert engine.setup["note"] is None


@pytest.mark.parametrize("backend", ["pread", "mmap", "resident", "ram_hybrid"])
def test_an_engine_says_the_same_with_and_without(tiny_pack: Path, backend: str) -> None:
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 200, 60)]
    logits = {}
    for kernels in ("auto", "mlx"):
        with flashmoe_mlx.load(tiny_pack, backend, kernels=kernels) as engine:
            cache = engine.new_cache()
            parts = [engine.forward(tokens[:40], cache), *(engine.forward([token], cache) for token in tokens[40:])]
            logits[kernels] = np.concatenate(parts)
    np.testing.assert_allclose(logits["auto"], logits["mlx"], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(logits["auto"].argmax(-1), logits["mlx"].argmax(-1))
