"""Prompts on the extension for CPUs: results in memory that nobody has written to, and work shared by many threads."""

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.custom_kernels import cases, native
from flashmoe_mlx.custom_kernels.cases import GEOMETRIES
from flashmoe_mlx.custom_kernels.native.untouched import untouched
from flashmoe_mlx.custom_kernels.quantized_matvec.cpu import products
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.routed_experts.cpu import routed_experts

SMALL = GEOMETRIES["small"]
F32 = mx.float32
TYPES = [name for name in native.ACTIVATIONS if native.has_activations(name)]


@pytest.fixture
def garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put all results into memory of MLX that holds NaN before."""

    def filled(shape: tuple[int, ...]) -> mx.array:
        array = untouched(shape)
        np.asarray(array)[...] = np.nan
        return array

    monkeypatch.setattr(native, "_COPIED", 0)
    monkeypatch.setattr(native, "untouched", filled)


@pytest.fixture
def own_threads() -> Iterator[None]:
    before = native.loaded().threads()
    yield
    native.loaded().use_threads(before)


@pytest.mark.usefixtures("garbage")
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_kernels_write_all_values_of_their_results(tokens: int) -> None:
    inputs = RandomInputs(F32, 0)
    made = [
        cases.quantized_matvec(301, 1088, F32, tokens=tokens, on_cpu=True),
        cases.routed_experts(SMALL, F32, group_size=32, tokens=tokens, k=2, on_cpu=True),
        cases.gated_delta_net(SMALL, F32, tokens=tokens, on_cpu=True),
        cases.attention(SMALL, F32, context=65 + tokens, tokens=tokens, on_cpu=True),
    ]
    for case in made:
        assert case.error() <= cases.TOLERANCE[F32]
    weight, x, residual = inputs.quantized(40, 64, 4, 32), inputs.normal(tokens, 64), inputs.normal(tokens, 40)
    (got,) = products(x, [weight], residual)
    np.testing.assert_allclose(got, residual + x @ weight.dense().T, rtol=1e-4, atol=1e-4)


def test_an_untouched_array_has_separate_memory_of_its_shape() -> None:
    one, other = untouched((3, 5)), untouched((3, 5))
    np.asarray(one)[...], np.asarray(other)[...] = 1, 2
    assert one.shape == (3, 5)
    assert one.dtype == F32
    assert (one + other).tolist() == [[3.0] * 5] * 3
    assert untouched((0, 4)).tolist() == []


@pytest.mark.usefixtures("own_threads")
@pytest.mark.parametrize("activations", TYPES)
def test_the_number_of_threads_changes_no_bit_of_a_prompt(activations: str) -> None:
    """Of a matrix with few rows, threads share the vectors too; experts of one batch have one or many vectors."""
    inputs = RandomInputs(F32, 0, mx.bfloat16)
    weights = [inputs.quantized(rows, 320, bits, 64) for rows, bits in ((70, 4), (33, 8), (20, 4))]
    x = inputs.normal(300, 320)
    made = cases.expert_inputs(SMALL, F32, bits=(4, 8, 4), group_size=32, tokens=300, k=2)
    rows = np.where(np.arange(600).reshape(300, 2) < 5, 1, np.array([[0, 2]])).astype(np.int32)
    made = replace(made, rows=mx.array(rows))
    found = []
    for threads in (1, 2, 16):
        native.loaded().use_threads(threads)
        ours = products(x, weights, None, activations)
        arguments = (made.x, made.records, made.rows, made.routing_weights, made.form, made.shared)
        found.append([*ours, routed_experts(*arguments, None, activations=activations)])
    for other in found[1:]:
        for got, expected in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(np.array(got), np.array(expected))


def test_matrices_of_an_expert_may_have_panels_of_different_widths() -> None:
    """The measured choice may be AVX2 with panels of 16 rows for one width, and AVX-512 with 32 for another."""
    extension = native.loaded()
    before, sets = extension.instruction_set(), extension.instruction_sets()
    made = cases.expert_inputs(SMALL, F32, bits=(4, 8, 4), group_size=32, tokens=40, k=2)
    arguments = (made.x, made.records, made.rows, made.routing_weights, made.form, made.shared)
    expected = np.array(routed_experts(*arguments, None))
    try:
        for wide in sets:
            for narrow in sets:
                extension.use_instruction_set(wide)
                extension.use_for_products(native.few_tokens() + 1, 0, 8, 32, narrow)
                got = np.array(routed_experts(*arguments, None))
                np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    finally:
        extension.use_instruction_set(before)


@pytest.mark.parametrize("name", native.loaded().instruction_sets())
@pytest.mark.parametrize("bits", native.BITS)
@pytest.mark.skipif("bf16" not in TYPES, reason="this machine has no products in bf16")
def test_products_in_bf16_by_floats_are_exact_products_of_rounded_vectors(name: str, bits: int) -> None:
    extension, inputs = native.loaded(), RandomInputs(F32, bits)
    before = extension.instruction_set()
    weight, x = inputs.quantized(37, 192, bits, 64), np.array(inputs.normal(20, 192))
    x[3, :5] = np.nan, np.inf, -np.inf, 3e38, 1e-30
    x[4, 7] = np.uint32(0x7F800001).view(np.float32)  # a NaN whose upper half is that of an infinity
    rounded = mx.array(x).astype(mx.bfloat16).astype(F32)
    try:
        extension.use_instruction_set(name)
        extension.use_for_products(len(x), native.ACTIVATIONS.index("bf16"), bits, 64, name)
        (got,), (expected,) = products(mx.array(x), [weight], None, "bf16"), products(rounded, [weight])
    finally:
        extension.use_instruction_set(before)
    np.testing.assert_array_equal(np.array(got), np.array(expected))
