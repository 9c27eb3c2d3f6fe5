"""The extension for CPUs: kernels equal their references in f64 on every instruction set of this machine; threads,
forks, bad arguments, and the choice of the extension.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from pack_oracle import assert_one_line

import flashmoe_mlx
from flashmoe_mlx.cli.application import run as run_command_line
from flashmoe_mlx.custom_kernels import cases, native, rounding_note
from flashmoe_mlx.custom_kernels.attention.cpu import gated_attention as attend_alone
from flashmoe_mlx.custom_kernels.attention_batch.cpu import gated_attention as attend_together
from flashmoe_mlx.custom_kernels.attention_batch.reference import AttentionBatch
from flashmoe_mlx.custom_kernels.cases import GEOMETRIES, TOLERANCE, Case, Geometry
from flashmoe_mlx.custom_kernels.gated_delta_net.cpu import gated_delta_net as recur_alone
from flashmoe_mlx.custom_kernels.gated_delta_net_batch.cpu import gated_delta_net as recur_together
from flashmoe_mlx.custom_kernels.gated_delta_net_batch.reference import DeltaBatch
from flashmoe_mlx.custom_kernels.quantized_matvec.cpu import products, quantized_matvec
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.routed_experts import reference
from flashmoe_mlx.custom_kernels.routed_experts.cpu import routed_experts
from flashmoe_mlx.errors import InputError

SMALL = GEOMETRIES["small"]
ODD = Geometry(160, 288, 5, 1, 80, 20, 1, 3, 48, 16)
"""Sizes of no real model: rows that end inside a block and inside a chunk, five query heads per key head."""
F32 = mx.float32


EXTENSION = native.extension()
assert EXTENSION is not None, "the extension is not built; pip install -v . says why"


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    assert EXTENSION is not None
    return EXTENSION


@pytest.fixture(params=EXTENSION.instruction_sets())
def instructions(request: pytest.FixtureRequest, extension: ModuleType) -> Iterator[str]:
    """Every instruction set of this machine."""
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
@pytest.mark.sampled(40)
def test_products_of_every_format(bits: int, group_size: int, scales: mx.Dtype) -> None:
    for columns in (group_size, 3 * group_size, 19 * group_size):
        for tokens in (1, 2, 7, 9):
            check(
                cases.quantized_matvec(
                    29, columns, F32, bits=bits, group_size=group_size, tokens=tokens, scales=scales, on_cpu=True
                )
            )


@pytest.mark.usefixtures("instructions")
def test_products_in_mxfp4() -> None:
    """Vectors in exact and rounded types, and rows that end inside a block; the bias cancels most of a sum."""
    inputs = RandomInputs(F32, 0, mx.uint8)
    for columns in (32, 96, 19 * 32):
        weight = inputs.quantized(53, columns, 4, 32)
        x = inputs.normal(40, columns)
        exact = np.array(x, np.float64) @ np.array(weight.dense(), np.float64).T
        for activations, error in ROUNDED.items():
            for tokens in (1, 2, 3, 7, 9, 40):
                (found,) = products(x[:tokens], [weight], None, activations)
                off = np.linalg.norm(np.array(found) - exact[:tokens])
                assert off <= (error if tokens > 8 else 1e-6) * 4 * np.linalg.norm(exact[:tokens])


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("shared", [False, True])
def test_routed_experts_in_mxfp4(shared: bool) -> None:
    for tokens, k in ((1, 3), (2, 2), (11, 2)):
        check(
            cases.routed_experts(
                ODD, F32, group_size=32, tokens=tokens, k=k, shared=shared, scales=mx.uint8, on_cpu=True
            )
        )


ROUNDED = {
    name: error for name, error in (("f32", 1e-6), ("bf16", 4e-3), ("int8", 1.2e-2)) if native.has_activations(name)
}
"""Largest error of products of many vectors, relative to the result, by the type of vectors."""


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("activations", ROUNDED)
@pytest.mark.parametrize("group_size", native.GROUP_SIZES)
@pytest.mark.parametrize("bits", native.BITS)
@pytest.mark.sampled(30)
def test_products_of_many_vectors(bits: int, group_size: int, activations: str) -> None:
    """Vectors in exact and rounded types; results do not depend on other vectors, so every block is the same."""
    inputs = RandomInputs(F32, bits, mx.bfloat16)
    for columns in (group_size, 9 * group_size, 19 * group_size):
        weight = inputs.quantized(53, columns, bits, group_size)
        x = inputs.normal(300, columns)
        exact = np.array(x, np.float64) @ np.array(weight.dense(), np.float64).T
        (whole,) = (np.array(y) for y in products(x, [weight], None, activations))
        assert np.linalg.norm(whole - exact) <= ROUNDED[activations] * np.linalg.norm(exact)
        for tokens in (*range(9, 26), 40):
            (part,) = (np.array(y) for y in products(x[:tokens], [weight], None, activations))
            np.testing.assert_array_equal(part, whole[:tokens])


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("activations", ROUNDED)
def test_routed_experts_of_many_vectors(activations: str) -> None:
    """Of the experts of a prompt, some have many tokens, and some a few."""
    made = cases.expert_inputs(ODD, F32, bits=4, group_size=32, tokens=40, k=2)
    rows = np.zeros((40, 2), np.int32)
    rows[:, 0] = np.repeat([0, 1, 2, 3], [1, 4, 9, 26])
    rows[:, 1] = -1
    arguments = (mx.array(rows), made.routing_weights, made.form, made.shared)
    found = routed_experts(made.x, made.records, *arguments, None, activations=activations)
    expected = reference.routed_experts(made.x, made.slab, *arguments)
    error = cases.relative_error(found, expected.astype(mx.float64, stream=mx.cpu))
    assert error <= 3 * ROUNDED[activations]


@pytest.mark.parametrize("activations", list(ROUNDED)[1:])
@pytest.mark.parametrize("bits", native.BITS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rounded_vectors_stay_nonfinite(value: float, bits: int, activations: str) -> None:
    inputs = RandomInputs(F32, 0)
    weight, x = inputs.quantized(40, 192, bits, 64), np.ones((9, 192), np.float32)
    x[4, 100] = value
    (found,) = (np.array(y) for y in products(mx.array(x), [weight], None, activations))
    assert not np.isfinite(found[4]).any()
    assert np.isfinite(np.delete(found, 4, 0)).all()


def test_rounded_vectors_of_any_magnitude() -> None:
    """Each group has a scale; groups of zeros and of tiny values, and a value far above the rest of its group."""
    inputs = RandomInputs(F32, 0)
    weight, x = inputs.quantized(40, 640, 4, 64), np.array(inputs.normal(9, 640))
    x[:, 64:128] *= 1e-20
    x[:, 128:192] = 0
    x[:, 192:256] *= 1e-36
    x[:, 256] = 1e5
    x[:, 320:384] = np.float32(1e30) * np.sign(x[:, 320:384])
    for end in (640, 256, 192, 64):
        x[:, end:] = 0
        exact = x.astype(np.float64) @ np.array(weight.dense(), np.float64).T
        for activations in list(ROUNDED)[1:]:
            (found,) = (np.array(y) for y in products(mx.array(x), [weight], None, activations))
            assert np.linalg.norm(found - exact) <= ROUNDED[activations] * np.linalg.norm(exact)


@pytest.mark.usefixtures("instructions", "threads")
@pytest.mark.parametrize("tokens", [1, 3, 4, 8, 16, 18, 33, 64, 65, 130])
@pytest.mark.sampled(30)
def test_products_of_several_vectors(tokens: int) -> None:
    check(cases.quantized_matvec(301, 1088, F32, tokens=tokens, scales=mx.bfloat16, on_cpu=True))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (2, 32), (3, 32), (8, 32), ((3, 4, 8), 32), ((2, 2, 3), 32)])
@pytest.mark.sampled(16)
def test_routed_experts_of_every_width(
    bits: int | tuple[int, int, int], group_size: int | tuple[int, int, int], shared: bool
) -> None:
    for tokens, k in ((1, 3), (2, 2), (11, 2)):
        check(
            cases.routed_experts(
                ODD, F32, bits=bits, group_size=group_size, tokens=tokens, k=k, shared=shared, on_cpu=True
            )
        )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 20), (3, 2), (8, 5), (40, 3), (150, 2)])
def test_routed_experts_of_several_tokens(tokens: int, k: int) -> None:
    check(
        cases.routed_experts(
            SMALL, F32, group_size=32, tokens=tokens, k=k, scales=mx.bfloat16, seed=tokens, on_cpu=True
        )
    )


def test_routed_experts_add_to_a_residual_and_a_shared_expert_may_differ() -> None:
    """The kernel adds groups of experts to earlier results; a 2-bit variant keeps its shared expert at 4 bits."""
    two, four = (cases.expert_inputs(SMALL, F32, bits=bits, group_size=32, tokens=5, k=2) for bits in (2, 4))
    residual = mx.random.normal(two.x.shape)
    got = routed_experts(two.x, two.records, two.rows, two.routing_weights, two.form, four.shared, residual)
    expected = reference.routed_experts(two.x, two.slab, two.rows, two.routing_weights, two.form, four.shared)
    assert cases.relative_error(got, (residual + expected).astype(mx.float64, stream=mx.cpu)) < 1e-5


@pytest.mark.usefixtures("instructions", "threads")
@pytest.mark.parametrize("tokens", [1, 2, 7, 70])
@pytest.mark.parametrize("geometry", [SMALL, ODD], ids=["small", "odd"])
def test_gated_delta_net(geometry: Geometry, tokens: int) -> None:
    check(cases.gated_delta_net(geometry, F32, tokens=tokens, on_cpu=True))


@pytest.mark.usefixtures("instructions", "threads")
@pytest.mark.parametrize(("context", "tokens"), [(1, 1), (2, 1), (63, 1), (600, 1), (9, 9), (300, 5), (150, 70)])
@pytest.mark.parametrize("geometry", [SMALL, ODD], ids=["small", "odd"])
@pytest.mark.sampled(40)
def test_attention(geometry: Geometry, context: int, tokens: int) -> None:
    check(cases.attention(geometry, F32, context=context, tokens=tokens, on_cpu=True))


@pytest.mark.usefixtures("instructions", "threads")
@pytest.mark.parametrize(("context", "tokens"), [(1, 1), (600, 1), (300, 5), (150, 70)])
@pytest.mark.parametrize("kv_bits", [16, 8, 4])
@pytest.mark.sampled(30)
def test_attention_with_narrow_keys_and_values(kv_bits: int, context: int, tokens: int) -> None:
    geometry = Geometry(192, 96, 6, 2, 64, 16, 2, 6, 32, 48)
    check(cases.attention(geometry, F32, context=context, tokens=tokens, on_cpu=True, kv_bits=kv_bits))


@pytest.mark.usefixtures("instructions", "threads")
@pytest.mark.parametrize(("context", "tokens"), [(600, 1), (300, 5), (150, 70)])
def test_attention_without_gates(context: int, tokens: int) -> None:
    check(cases.attention(ODD, F32, context=context, tokens=tokens, on_cpu=True, gated=False))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("lengths", [[1, 1, 1], [70, 1, 3]])
def test_sequences_together_give_the_bits_of_each_alone(lengths: list[int]) -> None:
    starts = [600, 0, 63]
    attention = [
        cases.attention_inputs(ODD, F32, context=start + length, tokens=length, seed=seed)
        for seed, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    weights, caches = attention[0].weights, [[one.keys, one.values] for one in attention]
    rows = [mx.concatenate([getattr(one, name) for one in attention]) for name in ("q_and_gate", "k", "v")]
    own = [[mx.array(np.array(cache)) for cache in both] for both in caches]
    got = attend_together(AttentionBatch(*rows, weights, *map(list, zip(*own, strict=True)), starts, lengths))
    alone = [attend_alone(replace(one, weights=weights)) for one in attention]
    assert_equal_to_each(got, alone)

    delta = [cases.delta_inputs(ODD, F32, tokens=length, seed=seed) for seed, length in enumerate(lengths)]
    rows = [mx.concatenate([getattr(one, name) for one in delta]) for name in ("qkv", "z", "b", "a")]
    states = [[mx.array(np.array(state)) for state in (one.conv_state, one.recurrent_state)] for one in delta]
    got = recur_together(DeltaBatch(*rows, delta[0].weights, *map(list, zip(*states, strict=True)), lengths))
    assert_equal_to_each(got, [recur_alone(replace(one, weights=delta[0].weights)) for one in delta])


def assert_equal_to_each(together: tuple[mx.array, ...], alone: list[tuple[mx.array, ...]]) -> None:
    """Check the results of a call for several sequences against the results of a call for each."""
    y, *arrays = together
    np.testing.assert_array_equal(np.array(y), np.concatenate([np.array(own) for own, *_ in alone]))
    for array, expected in zip(arrays, [array for _, *own in alone for array in own], strict=True):
        np.testing.assert_array_equal(np.array(array), np.array(expected))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("tokens", [1, 70])
def test_attention_with_given_frequencies(tokens: int) -> None:
    """YaRN gives frequencies."""
    frequencies = tuple(0.7 / (3 * pair + 1) for pair in range(SMALL.rotary_dim // 2))
    check(cases.attention(SMALL, F32, context=300, tokens=tokens, on_cpu=True, frequencies=frequencies))


def test_a_far_position_is_rotated_exactly() -> None:
    check(cases.attention(Geometry(64, 32, 1, 1, 32, 8, 1, 1, 32, 16), F32, context=100_000, on_cpu=True))


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "small"])
@pytest.mark.parametrize(
    "make",
    [
        partial(cases.routed_experts, k=2, scales=mx.bfloat16),
        cases.gated_delta_net,
        partial(cases.attention, context=700),
    ],
    ids=["routed_experts", "gated_delta_net", "attention"],
)
def test_shapes_of_published_models(make: Callable[..., Case], name: str) -> None:
    check(make(GEOMETRIES[name], F32, on_cpu=True))


def test_instruction_sets_agree_to_the_last_bits(extension: ModuleType) -> None:
    """All sums have the same order, but portable code rounds products before it adds, and VNNI sums integers."""
    inputs = cases.expert_inputs(SMALL, F32, bits=4, group_size=32, tokens=12, k=2)
    results = {}
    for name in extension.instruction_sets():
        extension.use_instruction_set(name)
        results[name] = np.array(
            routed_experts(inputs.x, inputs.records, inputs.rows, inputs.routing_weights, inputs.form, inputs.shared)
        )
    extension.use_instruction_set("auto")
    rounded = [results.pop(name) for name in ("portable", "avx512_vnni") if name in results]
    fused = list(results.values())
    for result in fused[1:]:
        np.testing.assert_allclose(result, fused[0], rtol=1e-6, atol=1e-7)
    for result in rounded:
        np.testing.assert_allclose(result, (fused or rounded)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("bits", native.BITS)
def test_vectors_of_any_magnitude(bits: int) -> None:
    """One value far above the rest of its group; groups of very different sizes, of zeros, and of tiny values."""
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
        got = np.array(quantized_matvec(mx.array(x), weight, scales, biases, bits, 64))
        np.testing.assert_allclose(got[0], dense @ x[0].astype(np.float64), atol=1e-6 * np.abs(dense * x).sum(-1).max())


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_nonfinite(value: float) -> None:
    x = np.ones((1, 192), np.float32)
    x[0, 100] = value
    weight = mx.array(np.random.default_rng(0).integers(0, 2**32, (5, 24), np.uint32))
    got = quantized_matvec(mx.array(x), weight, mx.ones((5, 3)), mx.zeros((5, 3)), 4, 64)
    assert not np.isfinite(np.array(got)).any()


def test_many_threads_at_once(extension: ModuleType) -> None:
    """A caller that finds the pool busy computes alone; all results are correct."""
    extension.use_threads(4)
    case = cases.quantized_matvec(600, 1024, F32, scales=mx.bfloat16, on_cpu=True)
    expected = np.array(case.custom()[0])
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: np.array(case.custom()[0]), range(400)):
            np.testing.assert_array_equal(result, expected)
    extension.use_threads(native.usable_cores())


def test_a_forked_process_starts_new_threads() -> None:
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
        n.products(x, 1, ((codes, scales, scales, 512, 1024, 4, 64, 0),), (y,), False, 0)
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
        (7, 4, "scales must be"),
        (7, 3, "groups of 32"),
        (4, 96, "whole groups"),
        (3, 9, "weight: 256 bytes, but 288 are needed"),
        (3, -1, "out of range"),
        (1, np.zeros(7, np.float32), "scales: 28 bytes, but 32 are needed"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(extension: ModuleType, place: int, value: object, message: str) -> None:
    matrix = (*MATRIX[:place], value, *MATRIX[place + 1 :])
    with pytest.raises(ValueError, match=message):
        extension.products(np.zeros(64 * 9, np.float32), 1, (matrix,), (np.zeros(64, np.float32),), False, 0)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, np.zeros((8, 4), np.int64), "weight: elements of type uint32 are needed, not "),
        (0, np.zeros((8, 8), np.float32), "weight: elements of type uint32 are needed, not f of 4 bytes"),
        (0, np.zeros((8, 8), ">u4"), "weight: elements of type uint32 are needed, not >I of 4 bytes"),
        (0, np.zeros((8, 32), np.uint8), "weight: elements of type uint32 are needed, not B of 1 bytes"),
        (1, np.zeros((8, 1), np.float64), "scales: elements of type f32 are needed, not d of 8 bytes"),
        (1, np.zeros((8, 1), np.int32), "scales: elements of type f32 are needed, not i of 4 bytes"),
        (2, np.zeros((8, 2), np.float16), "biases: elements of type f32 are needed, not e of 2 bytes"),
    ],
)
def test_elements_of_another_type_are_refused(
    extension: ModuleType, place: int, value: npt.NDArray[Any], message: str
) -> None:
    matrix = (*MATRIX[:place], value, *MATRIX[place + 1 :])
    with pytest.raises(ValueError, match=re.escape(message)):
        extension.products(np.zeros(64, np.float32), 1, (matrix,), (np.zeros(8, np.float32),), False, 0)


@pytest.mark.parametrize("wrong", ["x", "y"])
@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.float16, ">f4"])
def test_vectors_of_another_type_are_refused(extension: ModuleType, wrong: str, dtype: str) -> None:
    x, y = (np.zeros(128, dtype if wrong == which else np.float32) for which in ("x", "y"))
    with pytest.raises(ValueError, match=f"{wrong}: elements of type f32 are needed"):
        extension.products(x, 1, (MATRIX,), (y,), False, 0)


@pytest.mark.parametrize("dtype", [mx.int64, mx.uint32, mx.int16, mx.float32])
def test_rows_of_another_type_are_refused(dtype: mx.Dtype) -> None:
    """The bytes of an int64 could be read as two int32."""
    made = cases.expert_inputs(SMALL, F32, bits=4, group_size=32, tokens=2, k=2)
    rows = mx.maximum(made.rows, 0).astype(dtype)
    with pytest.raises(ValueError, match="rows: elements of type int32 are needed"):
        routed_experts(made.x, made.records, rows, made.routing_weights, made.form, made.shared)


@pytest.mark.parametrize(("columns", "count"), [(3, 3), (40, 7), (500, 7), (500, 1)])
def test_the_largest_values_of_rows(columns: int, count: int) -> None:
    """``tests/test_random_models.py`` compares the choice among equal values with torch's."""
    random = np.random.default_rng(0)
    values = np.maximum(random.normal(-0.5, 1, (20, columns)), 0).astype(np.float32)
    lengths = random.integers(count, columns + 1, len(values)).astype(np.int32)
    indices = native.largest(values, lengths, count)
    for row, length, own in zip(values, lengths, indices, strict=True):
        assert len(set(own.tolist())) == count
        assert sorted(row[own]) == sorted(row[:length])[-count:]


def test_nan_counts_as_the_largest_value() -> None:
    values = np.array([[1, np.nan, 3, np.nan, 2]], np.float32)
    assert set(native.largest(values, np.array([5], np.int32), 3)[0].tolist()) == {1, 2, 3}


@pytest.mark.parametrize(("length", "count"), [(2, 3), (5, 3), (4, 0)])
def test_a_choice_beyond_a_row_is_refused(length: int, count: int) -> None:
    with pytest.raises(ValueError, match=r"values|sizes"):
        native.largest(np.zeros((1, 4), np.float32), np.array([length], np.int32), count)


@pytest.mark.parametrize("tokens", [8, 600])
@pytest.mark.parametrize("residual", [False, True])
def test_small_and_large_results_are_equal(tokens: int, residual: bool) -> None:
    """Small results are copied into MLX's memory; large results are written there in place."""
    inputs = RandomInputs(F32, 0)
    weight, x = inputs.quantized(512, 64, 4, 32), inputs.normal(tokens, 64)
    added = inputs.normal(tokens, 512) if residual else None
    (got,) = products(x, [weight], added)
    expected = x @ weight.dense().T + (0 if added is None else added)
    assert cases.relative_error(got, expected.astype(mx.float64, stream=mx.cpu)) < 1e-5


def test_a_failure_in_any_thread_reaches_its_caller_and_the_pool_continues(tmp_path: Path) -> None:
    compiler = [shutil.which("c++") or ""] if shutil.which("c++") else [sys.executable, "-m", "ziglang", "c++"]
    root = Path(__file__).parent.parent
    program = tmp_path / "failures"
    sources = [root / "custom_kernels" / "native" / "pool.cpp", root / "tests" / "native" / "failures.cpp"]
    options = ["-std=c++17", "-O1", "-pthread", f"-I{sources[0].parent}", "-o", str(program)]
    subprocess.run([*compiler, *options, *map(str, sources)], check=True, capture_output=True, timeout=200)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "every failure reached its caller\n"), done.stderr


def test_results_must_be_writable_and_contiguous(extension: ModuleType) -> None:
    x = np.zeros(64, np.float32)
    with pytest.raises((BufferError, ValueError)):
        extension.products(x, 1, (MATRIX,), (bytes(32),), False, 0)
    with pytest.raises((BufferError, ValueError)):
        extension.products(x, 1, (MATRIX,), (np.zeros((8, 2), np.float32)[:, 0],), False, 0)


def test_an_input_with_gaps_is_read_correctly() -> None:
    case = cases.quantized_matvec(40, 128, F32, tokens=3, on_cpu=True)
    weight = mx.array(np.random.default_rng(0).integers(0, 2**32, (40, 16), np.uint32))
    scales = mx.random.normal((40, 2))
    x = mx.random.normal((128, 3)).T
    got = quantized_matvec(x, weight, scales, scales, 4, 64)
    np.testing.assert_allclose(
        got, mx.quantized_matmul(x, weight, scales, scales, group_size=64, bits=4), rtol=1e-4, atol=1e-4
    )
    check(case)


def test_environment_variables() -> None:
    script = "from flashmoe_mlx.custom_kernels import native; print(native.description())"
    variables = {"FLASHMOE_THREADS": "3", "FLASHMOE_INSTRUCTIONS": "portable"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, **variables}
    )
    assert done.stdout.strip() == "portable, 3 threads"


WRONG_VARIABLES = [
    *(
        ("FLASHMOE_THREADS", value)
        for value in ("none", "0", "-3", "1.5", "1e3", "257", "9" * 21, "9" * 5000, "\u0663", " ")
    ),
    *(("FLASHMOE_INSTRUCTIONS", value) for value in ("sse9", "AVX2", "avx2 ", "x" * 5000)),
]


@pytest.fixture
def fresh_extension(extension: ModuleType) -> Iterator[None]:
    """Read the environment variables again, here and after the test."""
    native.extension.cache_clear()
    yield
    native.extension.cache_clear()
    native.extension()


@pytest.mark.usefixtures("fresh_extension")
@pytest.mark.parametrize(("name", "value"), WRONG_VARIABLES, ids=lambda value: ascii(value)[:20])
def test_a_wrong_environment_variable_is_the_users_mistake(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tiny_pack: Path
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        flashmoe_mlx.load(tiny_pack)
    assert error.value.code == {"FLASHMOE_THREADS": "invalid_threads"}.get(name, "unknown_instructions")
    assert_one_line(str(error.value))
    assert len(str(error.value)) < 200


@pytest.mark.usefixtures("fresh_extension")
@pytest.mark.parametrize("name", ["FLASHMOE_THREADS", "FLASHMOE_INSTRUCTIONS"])
def test_an_empty_environment_variable_counts_as_unset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = native.description()
    monkeypatch.setenv(name, "")
    native.extension.cache_clear()
    assert native.description() == expected


@pytest.mark.usefixtures("fresh_extension")
@pytest.mark.parametrize("task", ["generate", "bench", "evaluate", "trace", "estimate", "doctor"])
@pytest.mark.parametrize("variable", [("FLASHMOE_THREADS", "9" * 21), ("FLASHMOE_INSTRUCTIONS", "x")])
@pytest.mark.sampled(4)
def test_every_task_names_a_wrong_environment_variable(
    task: str,
    variable: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(*variable)
    monkeypatch.chdir(tmp_path)
    assert run_command_line([f"task={task}", f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith(f"flashmoe_mlx: {variable[0]}={variable[1]}: ")


def test_the_record_of_a_run_names_the_implementation_of_every_path(tiny_pack: Path) -> None:
    with flashmoe_mlx.load(tiny_pack) as engine:
        engine.logits(list(range(30)))
        names = engine.setup["kernels"]
    for operation, paths in {
        "attention": ["one token", "several tokens"],
        "attention_batch": ["one token of each", "several tokens"],
        "gated_delta_net": ["one token", "several tokens"],
        "gated_delta_net_batch": ["one token of each", "several tokens"],
        "routed_experts": ["one token", "2 to 8 tokens", "more than 8 tokens"],
        "quantized_matvec": ["one token", "2 to 8 tokens", "more than 8 tokens"],
        "rms_norm": ["one token", "several tokens"],
    }.items():
        for path in paths:
            found = {runs for name, runs in names.items() if name.startswith(f"{operation}: {path}")}
            assert found == {f"native kernel {operation} ({native.description()})"}
    assert engine.setup["note"] is None
    assert engine.setup["replaced_kernels"] == []


@pytest.mark.parametrize("backend", ["pread", "mmap", "resident", "ram_hybrid"])
@pytest.mark.sampled(2)
def test_an_engine_gives_the_same_logits_with_and_without(tiny_pack: Path, backend: str) -> None:
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 200, 60)]
    logits = {}
    for kernels in ("auto", "mlx"):
        with flashmoe_mlx.load(tiny_pack, backend, kernels=kernels) as engine:
            cache = engine.new_cache()
            parts = [engine.forward(tokens[:40], cache), *(engine.forward([token], cache) for token in tokens[40:])]
            logits[kernels] = np.concatenate(parts)
    np.testing.assert_allclose(logits["auto"], logits["mlx"], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(logits["auto"].argmax(-1), logits["mlx"].argmax(-1))


@pytest.mark.parametrize("activations", list(ROUNDED)[1:])
def test_an_engine_with_rounded_activations(tiny_pack: Path, activations: str) -> None:
    """Prompts are close to exact; steps are exact; the record names every code path that rounds."""
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 200, 60)]
    with flashmoe_mlx.load(tiny_pack) as engine, flashmoe_mlx.load(tiny_pack, activations=activations) as rounded:
        exact, found = engine.logits(tokens), rounded.logits(tokens)
        assert 0 < np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact)
        np.testing.assert_array_equal(rounded.logits(tokens[:8]), engine.logits(tokens[:8]))
        setup = rounded.setup
    assert setup["activations"] == activations
    assert f"activations={activations}: " in setup["note"]
    for operation in ("quantized_matvec", "routed_experts"):
        many = [name for name in setup["kernels"] if name.startswith(f"{operation}: more than 8 tokens")]
        assert many
        assert all(f"vectors in {activations}" in name for name in many)
    assert not any("vectors in" in name for name in setup["kernels"] if "more than 8 tokens" not in name)


@pytest.mark.parametrize(
    ("activations", "kernels", "code"),
    [
        ("int4", "auto", "unknown_activations"),
        ("f32", "auto", "unknown_activations"),
        ("int8", "mlx", "activations_without_effect"),
        ("bf16", "reference", "activations_without_effect"),
    ],
)
def test_activations_without_effect_are_refused(tiny_pack: Path, activations: str, kernels: str, code: str) -> None:
    with pytest.raises(InputError) as error:
        flashmoe_mlx.load(tiny_pack, kernels=kernels, activations=activations)
    assert error.value.code == code
    assert_one_line(str(error.value))


def test_activations_without_effect_on_a_model_are_refused() -> None:
    """A model without quantized matrices has no products that round."""
    assert rounding_note("f32", ["rms_norm: one token"]) is None
    with pytest.raises(InputError) as error:
        rounding_note("int8", ["rms_norm: one token"])
    assert error.value.code == "activations_without_effect"
