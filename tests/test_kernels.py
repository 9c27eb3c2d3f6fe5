"""Custom kernels equal their references in f64: in everyday tests as Metal text that runs on the CPU, on GPUs with
``-m metal`` or ``-m cuda``; and ``choose`` selects the right implementations.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import metal_on_cpu
import mlx.core as mx
import numpy as np
import pytest
from nvrtc import compile_for_cuda, registers
from systems import needs_linux, needs_nvrtc

from flashmoe_mlx.custom_kernels import DeltaInputs, ExpertWeights, QuantizedWeight, cases, choose, kernel, native
from flashmoe_mlx.custom_kernels.attention import gpu as attention
from flashmoe_mlx.custom_kernels.cases import GEOMETRIES, TOLERANCE, Case, relative_error
from flashmoe_mlx.custom_kernels.choose_experts import gpu as choose_experts
from flashmoe_mlx.custom_kernels.choose_experts import reference as choose_reference
from flashmoe_mlx.custom_kernels.dense_experts import gpu as dense_experts
from flashmoe_mlx.custom_kernels.dense_experts import reference as dense_reference
from flashmoe_mlx.custom_kernels.expert_format import expert_format
from flashmoe_mlx.custom_kernels.gated_delta_net import chunked
from flashmoe_mlx.custom_kernels.gated_delta_net import gpu as gated_delta_net
from flashmoe_mlx.custom_kernels.gated_delta_net import reference as delta_reference
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import GatedDelta
from flashmoe_mlx.custom_kernels.nvidia import Gpu
from flashmoe_mlx.custom_kernels.quantized_matvec import gpu as quantized_matvec
from flashmoe_mlx.custom_kernels.quantized_matvec import mlx as matvec_mlx
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.routed_experts import gpu as routed_experts
from flashmoe_mlx.custom_kernels.routed_experts.grouped import RowKernels
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.record import RecordLayout

TARGETS = [
    pytest.param("metal on cpu", id="metal_on_cpu", marks=needs_linux),
    pytest.param("metal", id="metal", marks=pytest.mark.metal),
    pytest.param("cuda", id="cuda", marks=pytest.mark.cuda),
]
DTYPES = [pytest.param(mx.float32, id="f32"), pytest.param(mx.bfloat16, id="bf16")]
SMALL = GEOMETRIES["small"]
PUBLISHED = [name for name in GEOMETRIES if name != "small"]
WIDTHS = [(bits, group_size) for bits in (2, 3, 4, 8) for group_size in (32, 64, 128)]
ODD = cases.Geometry(128, 384, 5, 1, 96, 20, 1, 3, 64, 16)
"""Sizes of no real model: rows and rotary pairs that do not fill a simdgroup, five query heads per key head."""


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device that runs the kernels."""
    if request.param == "metal on cpu":
        monkeypatch.setattr(kernel, "dialect", lambda: "metal")
        monkeypatch.setattr(mx.fast, "metal_kernel", metal_on_cpu.metal_kernel)
        kernel.compiled.cache_clear()
        with metal_on_cpu.writable("keys", "values"):
            yield request.param
        kernel.compiled.cache_clear()
    else:
        yield request.param


def check(case: Case) -> None:
    assert case.error() <= TOLERANCE[case.dtype]


def only_on_a_gpu(target: str, condition: bool, instead: str) -> None:
    """Skip a case by emulation that emulation cannot distinguish from another case."""
    if condition and target == "metal on cpu":
        pytest.skip(f"by emulation {instead}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), WIDTHS)
def test_routed_experts_of_every_width(bits: int, group_size: int, dtype: mx.Dtype, target: str) -> None:
    only_on_a_gpu(target, dtype == mx.bfloat16 and group_size != 64, "f32, which is exact, shows groups of every size")
    check(cases.routed_experts(ODD, dtype, bits=bits, group_size=group_size))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize(("bits", "group_size"), [((3, 3, 4), 64), ((8, 2, 4), (128, 32, 64))])
def test_routed_experts_of_mixed_widths(bits: tuple[int, int, int], group_size: int | tuple[int, int, int]) -> None:
    check(cases.routed_experts(ODD, mx.float32, bits=bits, group_size=group_size, tokens=2))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize(
    ("shared", "dtype"),
    [
        pytest.param(False, mx.float32, id="False-f32"),
        pytest.param(True, mx.bfloat16, id="True-bf16"),
        pytest.param(True, mx.float32, id="True-f32", marks=pytest.mark.thorough),
        pytest.param(False, mx.bfloat16, id="False-bf16", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 20), (3, 2), (8, 5)])
def test_routed_experts_of_several_tokens(tokens: int, k: int, shared: bool, dtype: mx.Dtype) -> None:
    check(cases.routed_experts(SMALL, dtype, group_size=32, tokens=tokens, k=k, shared=shared, seed=tokens))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "k", "tokens"), [(5, 2, 1), (64, 10, 1), (512, 4, 3)])
def test_chosen_experts(experts: int, k: int, tokens: int, dtype: mx.Dtype) -> None:
    check(cases.chosen_experts(SMALL, dtype, group_size=32, tokens=tokens, k=k, experts=experts))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("renormalized", [True, False])
@pytest.mark.parametrize(("shared", "tokens"), [(True, 1), (False, 1), (False, 3)])
def test_chosen_experts_of_other_routers(shared: bool, tokens: int, renormalized: bool) -> None:
    options = {"group_size": 32, "tokens": tokens, "experts": 33, "shared": shared, "renormalized": renormalized}
    check(cases.chosen_experts(SMALL, mx.float32, **options))


@pytest.mark.cuda
@pytest.mark.parametrize(("experts", "k", "bits"), [(64, 10, 4), (512, 10, 4), (512, 4, 2)])
def test_chosen_experts_in_one_dispatch(experts: int, k: int, bits: int) -> None:
    check(cases.chosen_experts(GEOMETRIES["397B"], mx.bfloat16, k=k, experts=experts, bits=bits))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", DTYPES)
def test_short_prompts_through_the_kernels_of_a_step(dtype: mx.Dtype) -> None:
    check(cases.routed_experts(SMALL, dtype, group_size=32, tokens=20, k=3))
    check(cases.gated_delta_net(ODD, dtype, tokens=100))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "k", "tokens"), [(8, 8, 1), (60, 4, 3), (64, 1, 1), (512, 10, 2), (1000, 32, 1)])
def test_choose_experts(experts: int, k: int, tokens: int, dtype: mx.Dtype) -> None:
    table = mx.array(np.random.default_rng(1).permutation(experts), mx.int32)
    scores = choose_experts.different_scores(tokens, experts, dtype, seed=k)
    found, expected = (
        [np.array(part) for part in choose(scores, table, k)]
        for choose in (choose_experts.choose_experts, choose_reference.choose_experts)
    )
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("renormalized", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_weights_of_chosen_experts(shared: bool, renormalized: bool) -> None:
    table, scores = mx.arange(45, dtype=mx.int32), RandomInputs(mx.float32, 0).normal(3, 46, scale=3.0)
    found, expected = (
        np.array(choose(scores, table, 5, shared, renormalized)[2])
        for choose in (choose_experts.choose_experts, choose_reference.choose_experts)
    )
    assert found.shape == (3, 5 + shared)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    own = np.array(mx.softmax(scores[:, :45], axis=-1))
    largest = np.sort(own)[:, -5:].sum(-1)
    np.testing.assert_allclose(found[:, :5].sum(-1), np.ones(3) if renormalized else largest, rtol=1e-5)


@pytest.mark.parametrize("tokens", [8, 9])
def test_products_of_many_rows_on_cuda(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are dense products, because MLX would compile a kernel for each of their shapes."""
    dense = np.random.default_rng(0).standard_normal((32, 128)).astype(np.float32)
    weight, scales, biases = mx.quantize(mx.array(dense), 64, 4)
    x = mx.array(np.random.default_rng(1).standard_normal((tokens, 128)).astype(np.float32))
    expected = matvec_mlx.quantized_matvec(x, weight, scales, biases, 4, 64)
    monkeypatch.setattr(matvec_mlx, "dialect", lambda: "cuda")
    if tokens > 8:
        monkeypatch.delattr(mx, "quantized_matmul")
    found = matvec_mlx.quantized_matvec(x, weight, scales, biases, 4, 64)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("target")
def test_choose_experts_by_odd_scores() -> None:
    """Of equal scores the first wins; scores that are not numbers choose experts that exist."""
    table, rest = mx.arange(40, dtype=mx.int32), mx.zeros((3, 1))
    scores = np.zeros((3, 40), np.float32)
    scores[1] = np.arange(40) % 3
    scores[2] = np.nan
    chosen, places, weights = choose_experts.choose_experts(mx.concatenate([mx.array(scores), rest], axis=1), table, 5)
    assert np.array(chosen)[:2].tolist() == [[0, 1, 2, 3, 4], [2, 5, 8, 11, 14]]
    np.testing.assert_allclose(np.array(weights)[:2], np.tile([0.2] * 5 + [0.5], (2, 1)), rtol=1e-6)
    assert set(np.array(places).ravel().tolist()) <= set(range(40))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 128), (8, 64), ((3, 8, 2), (64, 128, 32))])
def test_dense_experts(
    bits: int | tuple[int, int, int], group_size: int | tuple[int, int, int], dtype: mx.Dtype
) -> None:
    check(cases.dense_experts(ODD, dtype, bits=bits, group_size=group_size))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_experts_out_of_the_kernel(dtype: mx.Dtype) -> None:
    # MLX's products in bf16 are too rough on a CPU.
    dense = dense_experts.dense_experts
    on_cpu = mx.default_device() == mx.cpu
    case = cases.grouped_experts(SMALL, mx.float32 if on_cpu else dtype, dense, RowKernels(), tokens=40, experts=18)
    check(case)


@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 1, 1), (9, 4, 6), (100, 5, 40), (3, 20, 33)])
def test_grouped_experts(tokens: int, k: int, experts: int) -> None:
    dense = dense_reference.dense_experts
    check(cases.grouped_experts(SMALL, mx.float32, dense, RowKernels(), tokens=tokens, k=k, experts=experts))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
@pytest.mark.parametrize("geometry", [SMALL, ODD], ids=["small", "odd"])
def test_gated_delta_net(geometry: cases.Geometry, tokens: int, dtype: mx.Dtype) -> None:
    check(cases.gated_delta_net(geometry, dtype, tokens=tokens))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2])
def test_gated_delta_net_of_several_sequences(tokens: int, dtype: mx.Dtype) -> None:
    check(cases.gated_delta_net(ODD, dtype, tokens=tokens, sequences=3))


RULES = [
    pytest.param(chunked.gated_delta, id="mlx"),
    pytest.param(chunked.gated_delta_on_host, id="numpy"),
    pytest.param(chunked.gated_delta, id="metal", marks=pytest.mark.metal),
    pytest.param(chunked.gated_delta, id="cuda", marks=pytest.mark.cuda),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("geometry", [SMALL, ODD], ids=["small", "odd"])
@pytest.mark.sampled(24)
def test_prompts_through_gated_delta_net(
    geometry: cases.Geometry, tokens: int, dtype: mx.Dtype, rule: GatedDelta
) -> None:
    check(cases.gated_delta_net_in_chunks(geometry, dtype, tokens=tokens, rule=rule))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.sampled(2)
def test_prompts_through_gated_delta_net_of_a_published_model(dtype: mx.Dtype, rule: GatedDelta) -> None:
    check(cases.gated_delta_net_in_chunks(GEOMETRIES["35B"], dtype, tokens=100, rule=rule))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", [1.0, 0.9999, 1e-3, 1e-30, 0.0])
def test_similar_keys_and_decays_of_any_size(decay: float, rule: GatedDelta) -> None:
    """These keys give a chunk's system its worst condition; a decay of 0 forgets everything."""
    random = np.random.default_rng(0)
    heads, tokens, size = 4, 150, 32

    def unit(alike: float) -> mx.array:
        values = random.standard_normal((1, tokens, 2, size)) + alike * random.standard_normal((1, 1, 2, size))
        return mx.array((values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32))

    decays = np.where(random.random((1, tokens, heads)) < 0.9, 0.9999, decay)
    inputs = [
        unit(0),
        unit(20),
        mx.array(random.standard_normal((1, tokens, heads, 16)), mx.float32),
        mx.array(decays, mx.float32),
        mx.array(random.uniform(0.9, 1, (1, tokens, heads)), mx.float32),
        mx.array(random.standard_normal((1, heads, 16, size)), mx.float32),
    ]
    with mx.stream(mx.cpu):
        expected = delta_reference.gated_delta(*(array.astype(mx.float64) for array in inputs))
        mx.eval(expected)
    for found, exact in zip(rule(*inputs), expected, strict=True):
        assert relative_error(found, exact) <= TOLERANCE[mx.float32]


@pytest.mark.parametrize("rule", RULES[:2])
def test_a_prompt_in_pieces_equals_the_whole(rule: GatedDelta) -> None:
    made = cases.delta_inputs(SMALL, mx.float32, tokens=150)
    whole = delta_reference.gated_delta_net(made, rule)
    outputs, states = [], (made.conv_state, made.recurrent_state)
    for piece in (slice(0, 70), slice(70, 71), slice(71, 150)):
        arrays = [array[piece] for array in (made.qkv, made.z, made.b, made.a)]
        y, *states = delta_reference.gated_delta_net(DeltaInputs(*arrays, made.weights, *states), rule)
        outputs.append(y)
    for found, expected in zip((mx.concatenate(outputs), *states), whole, strict=True):
        assert relative_error(found, expected.astype(mx.float64, stream=mx.cpu)) <= TOLERANCE[mx.float32]


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_inverse_of_a_unit_lower_triangular_matrix(size: int) -> None:
    below = np.tril(np.random.default_rng(size).uniform(-1, 1, (2, 3, size, size)), -1) * 4 / size
    inverse = np.array(chunked.unit_lower_inverse(mx.array(below, mx.float32)))
    assert np.allclose(inverse @ (np.eye(size) + below), np.eye(size), atol=1e-5)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("context", "tokens"), [(1, 1), (2, 1), (63, 1), (600, 1), (9, 9), (300, 5)])
@pytest.mark.parametrize("geometry", [SMALL, ODD], ids=["small", "odd"])
def test_attention(geometry: cases.Geometry, context: int, tokens: int, dtype: mx.Dtype) -> None:
    check(cases.attention(geometry, dtype, context=context, tokens=tokens))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize(
    ("dtype", "kv_bits"), [(mx.float32, None), (mx.bfloat16, None), (mx.float32, 8), (mx.float32, 4)]
)
def test_attention_of_several_sequences(dtype: mx.Dtype, kv_bits: int | None) -> None:
    check(cases.attention(SMALL, dtype, context=600, more_starts=(0, 255, 256, 31), kv_bits=kv_bits))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("context", "tokens"), [(600, 1), (300, 5)])
def test_attention_without_gates(context: int, tokens: int, dtype: mx.Dtype) -> None:
    check(cases.attention(SMALL, dtype, context=context, tokens=tokens, gated=False))


# Heads, kv heads, dimensions, rotated dimensions: full and half rows of a product, few and odd heads per key, other
# widths.
ATTENTIONS = [(32, 2, 256, 64), (16, 2, 256, 64), (10, 2, 256, 128)]
ATTENTIONS += [(32, 4, 128, 128), (16, 1, 128, 64), (9, 9, 256, 256)]


@pytest.mark.cuda
@pytest.mark.parametrize("context", [1, 2, 31, 32, 33, 64, 65, 2048, 2049, 12_345])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "rotary"), ATTENTIONS)
def test_attention_on_tensor_cores(heads: int, kv_heads: int, width: int, rotary: int, context: int) -> None:
    """Full, partial and single tiles, and more tiles in a span than are in flight at once."""
    geometry = cases.Geometry(64, 32, heads, kv_heads, width, rotary, 1, 1, 32, 16)
    weights = cases.attention_inputs(geometry, mx.bfloat16, context=1).weights
    assert attention.stages_on_tensor_cores(weights, mx.bfloat16)
    check(cases.attention(geometry, mx.bfloat16, context=context, seed=context))
    more_starts = (0, context // 2, context - 1)
    check(cases.attention(geometry, mx.bfloat16, context=context, seed=context, more_starts=more_starts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "group_size", "tokens"),
    [
        # The number of tokens changes the loop over vectors, groups of other sizes the loop over words.
        pytest.param(*width, tokens, marks=[pytest.mark.thorough] if tokens > 1 and width[1] != 64 else [])
        for width in WIDTHS
        for tokens in (1, 8)
    ],
)
def test_quantized_matvec(bits: int, group_size: int, tokens: int, dtype: mx.Dtype, target: str) -> None:
    only_on_a_gpu(target, dtype == mx.bfloat16 and group_size != 64, "f32, which is exact, shows groups of every size")
    check(cases.quantized_matvec(20, 384, dtype, bits=bits, group_size=group_size, tokens=tokens))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("397B", mx.bfloat16, id="397B-bf16"),
        pytest.param("35B", mx.bfloat16, id="35B-bf16"),
        *(
            pytest.param(name, dtype.values[0], id=f"{name}-{dtype.id}", marks=pytest.mark.thorough)
            for name in PUBLISHED
            for dtype in DTYPES
            if name not in ("397B", "35B") or dtype.id == "f32"
        ),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        partial(cases.routed_experts, k=4),
        partial(cases.routed_experts, k=2, bits=2, shared=False),
        cases.gated_delta_net,
        partial(cases.attention, context=700),
    ],
    ids=["routed_experts", "routed_experts-2bit", "gated_delta_net", "attention"],
)
@pytest.mark.sampled(3)
def test_shapes_of_published_models(make: Callable[..., Case], name: str, dtype: mx.Dtype, target: str) -> None:
    only_on_a_gpu(target, dtype == mx.float32 and name != "35B", "bf16, as models have it, shows the largest sizes")
    mixer = make is cases.gated_delta_net or (isinstance(make, partial) and make.func is cases.attention)
    only_on_a_gpu(target, mixer and name == "122B", "the 397B, whose mixers have the same sizes, shows them")
    check(make(GEOMETRIES[name], dtype))


WHOLE_CHUNKS = cases.Geometry(1024, 512, 6, 2, 32, 8, 2, 6, 32, 48)
"""The smallest sizes for which routed experts take one dispatch on NVIDIA GPUs."""


@pytest.mark.cuda
@pytest.mark.parametrize(("k", "shared"), [(1, False), (5, False), (20, True)])
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_routed_experts_in_one_dispatch(bits: int, group_size: int, k: int, shared: bool) -> None:
    sizes = {"bits": bits, "group_size": group_size, "k": k, "shared": shared, "seed": k}
    check(cases.routed_experts(WHOLE_CHUNKS, mx.bfloat16, **sizes))


@pytest.mark.cuda
def test_repeated_calls_of_routed_experts() -> None:
    """Every call resets the counters for the next call, and calls may run concurrently."""
    made = cases.routed_experts(GEOMETRIES["397B"], mx.bfloat16, k=10, shared=False)
    first = np.array(made.custom()[0].astype(mx.float32))
    for together in (1, 7, 300):
        results = [made.custom() for _ in range(together)]
        mx.eval(results)
        for (y,) in results:
            assert np.array_equal(np.array(y.astype(mx.float32)), first)


@pytest.mark.cuda
@pytest.mark.parametrize(("rows", "columns"), [(16, 1024), (208, 3072), (4096, 4096), (1024, 8192)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_matvec_of_whole_chunks(bits: int, rows: int, columns: int) -> None:
    check(cases.quantized_matvec(rows, columns, mx.bfloat16, bits=bits, group_size=128 if rows == 208 else 64))


@pytest.mark.usefixtures("target")
def test_a_far_position_is_rotated_exactly() -> None:
    """An angle in one float would have an error of a thousandth here."""
    geometry = cases.Geometry(64, 32, 1, 1, 32, 8, 1, 1, 32, 16)
    check(cases.attention(geometry, mx.float32, context=100_000, tokens=2))


def test_the_checks_notice_an_unwritten_element() -> None:
    whole = mx.ones((4,))
    assert relative_error(whole, whole.astype(mx.float64)) == 0
    assert relative_error(mx.array([1.0, 1.0, 1.0, float("nan")]), whole.astype(mx.float64)) == float("inf")
    assert relative_error(mx.ones((3,)), whole.astype(mx.float64)) == float("inf")


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize(("kv_bits", "width", "tokens"), [(8, 32, 1), (4, 64, 1), (8, 64, 3), (4, 96, 2), (4, 256, 1)])
def test_attention_with_narrow_keys_and_values(kv_bits: int, width: int, tokens: int) -> None:
    geometry = cases.Geometry(64, 32, 4, 2, width, 16, 1, 1, 32, 16)
    check(cases.attention(geometry, mx.float32, context=70, tokens=tokens, kv_bits=kv_bits))


@needs_linux
@pytest.mark.parametrize("kv_bits", [16, 8])
def test_attention_reads_a_cache_after_the_kernel_that_writes_it(kv_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU an operation that reads a cache may run before the kernel that writes it, unless it uses its output."""
    late: list[tuple[mx.array, mx.array]] = []

    def metal_kernel(name: str, inputs: Sequence[str], *rest: Any) -> Callable[..., list[mx.array]]:
        real = metal_on_cpu.metal_kernel(name, inputs, *rest)

        def call(**arguments: Any) -> list[mx.array]:
            copies = [array * 1 for array in arguments["inputs"]]
            late.extend(zip(arguments["inputs"], copies, strict=True))
            return real(**arguments | {"inputs": copies})

        return call

    def after(output: mx.array, array: mx.array) -> mx.array:
        mx.eval(output)
        for old, new in late:
            np.asarray(memoryview(old).cast("B"))[:] = np.asarray(memoryview(new).cast("B"))
        return array * 1

    monkeypatch.setattr(kernel, "dialect", lambda: "metal")
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    for module in (attention, cases):
        monkeypatch.setattr(module, "after", after)
    kernel.compiled.cache_clear()
    with metal_on_cpu.writable("keys", "values"):
        check(cases.attention(SMALL, mx.float32, context=70, tokens=3, kv_bits=kv_bits))
    kernel.compiled.cache_clear()


@pytest.mark.parametrize("operation", ["routed_experts", "gated_delta_net", "attention", "quantized_matvec"])
def test_mlx_operations_equal_the_references(operation: str) -> None:
    make = {
        "routed_experts": partial(cases.routed_experts, SMALL, group_size=32),
        "gated_delta_net": partial(cases.gated_delta_net, SMALL, tokens=3),
        "attention": partial(cases.attention, SMALL, context=70, tokens=9),
        "quantized_matvec": partial(cases.quantized_matvec, 64, 128),
    }[operation]
    case = make(mx.float32)
    for found, expected in zip(case.standard(), case.reference(), strict=True):
        assert relative_error(found, expected) <= TOLERANCE[mx.float32]


@pytest.mark.parametrize("bits", [None, 2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 5])
def test_expert_mlp_by_mlx_equals_the_reference(bits: int | None, tokens: int) -> None:
    random = np.random.default_rng(0)

    def weight(rows: int, columns: int) -> QuantizedWeight:
        dense = mx.array(random.standard_normal((rows, columns)) * columns**-0.5, mx.float32)
        quantized = mx.quantize(dense, group_size=64, bits=bits or 4)
        return QuantizedWeight(dense) if bits is None else QuantizedWeight(*quantized, bits, 64)

    expert = ExpertWeights(weight(192, 128), weight(192, 128), weight(128, 192))
    x = mx.array(random.standard_normal((tokens, 128)), mx.float32)
    got, expected = (choose(preference).expert_mlp(x, expert) for preference in ("mlx", "reference"))
    assert relative_error(got, expected.astype(mx.float64, stream=mx.cpu)) <= TOLERANCE[mx.float32]


BF16, F32, U8, U32, I32 = mx.bfloat16, mx.float32, mx.uint8, mx.uint32, mx.int32
OFFSETS = {
    f"{projection}_{part}": 64 * i
    for i, (projection, part) in enumerate(
        (projection, part) for projection in ("GATE", "UP", "DOWN") for part in ("WEIGHT", "SCALES", "BIASES")
    )
}
EXPERTS = {"HIDDEN": 4096, "INTERMEDIATE": 1024, "CHOICES": 5, "RECORD_BYTES": 2**20, "ROWS": 4} | OFFSETS


def formats(bits: int | tuple[int, int, int], dtype: mx.Dtype, group_size: int = 64) -> dict[str, int | mx.Dtype]:
    """Return the template arguments for the formats of gate, up and down."""
    widths = (bits,) * 3 if isinstance(bits, int) else bits
    template: dict[str, int | mx.Dtype] = {}
    for name, width in zip(("GATE", "UP", "DOWN"), widths, strict=True):
        template |= {f"{name}_BITS": width, f"{name}_GROUP": group_size, f"{name}_S": dtype}
    return template


@needs_nvrtc
@pytest.mark.parametrize(("shared", "dtype"), [(False, mx.float32), (True, mx.bfloat16)])  # every word of the text
@pytest.mark.parametrize("bits", [2, 3, 4, 8, (3, 2, 8)])
@pytest.mark.sampled(3)
def test_routed_experts_compile_for_cuda(shared: bool, bits: int | tuple[int, int, int], dtype: mx.Dtype) -> None:
    gate_up, down = routed_experts.kernels(shared)
    own = [U32, dtype, dtype] * shared
    template = EXPERTS | {"T": dtype} | formats(bits, dtype)
    result = {"RESULT": mx.float32 if shared else dtype}
    assert compile_for_cuda(gate_up, [dtype, U8, I32, *own, *own], [F32], template | {"THREADS": 128})
    inputs = [F32, result["RESULT"], U8, I32, F32, *own]
    assert compile_for_cuda(down, inputs, [result["RESULT"]], template | result | {"TEAM": 32, "SIMDGROUPS": 5})


@needs_nvrtc
@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (4, 128)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.sampled(1)
def test_routed_experts_on_tensor_cores_compile_for_cuda(shared: bool, group_size: int, bits: int) -> None:
    gate_up, down = routed_experts.kernels(shared, tensor=True)
    own = [U32, BF16, BF16] * shared
    template = EXPERTS | {"T": BF16} | formats(bits, BF16, group_size)
    assert compile_for_cuda(gate_up, [BF16, U8, I32, *own, *own], [BF16], template | {"SIMDGROUPS": 4, "DEPTH": 4})
    parts: dict[str, int | mx.Dtype] = {"SIMDGROUPS": 5, "DEPTH": 4, "RESULT": F32}
    assert compile_for_cuda(down, [BF16, F32, U8, I32, F32, *own], [F32], template | parts)
    template = {"T": BF16, "COLUMNS": 4096, "OUTPUTS": 1024, "BITS": bits, "GROUP": group_size}
    template |= {"SIMDGROUPS": 4, "DEPTH": 4}
    tensor = quantized_matvec.tensor_kernel(shared)
    assert compile_for_cuda(tensor, [BF16, U32, BF16, BF16, *[BF16] * shared], [BF16], template)


H200 = Gpu(multiprocessors=132, capability=9, shared_memory=232448)


def launches(registers_a_thread: int, threads: int) -> bool:
    """Return whether a multiprocessor has enough registers: 16384 in each of four parts, which share the simdgroups."""
    simdgroups = -(-threads // 128)  # in a part
    return simdgroups * 32 * (-(-registers_a_thread // 8) * 8) <= 16384


@needs_nvrtc
@pytest.mark.parametrize(
    ("bits", "group_size", "shared", "chooses"),
    [(4, 64, True, False), (4, 64, True, True), (2, 128, False, True), (8, 64, False, False)],
)
@pytest.mark.sampled(1)
def test_kernels_with_the_copy_engine_compile_for_cuda(bits: int, group_size: int, shared: bool, chooses: bool) -> None:
    form = expert_format(RecordLayout.uniform(4096, 1024, bits, group_size, "BF16"))
    assert form is not None
    plan = routed_experts.fused_plan(form, BF16, 1, 5, H200)
    assert plan is not None
    own = [U32, BF16, BF16] * shared
    result = BF16 if shared else F32  # f32 for a part of a sum
    template = EXPERTS | {"T": BF16, "RESULT": result, "BITS": bits, "GROUP": group_size} | dict(plan.template)
    inputs = [BF16, result, U8, *([BF16, I32, I32] if chooses else [I32, F32]), U32, *own, *own, *own]
    fused = routed_experts.fused_kernel(shared, plan.shared_memory, chooses)
    if chooses:
        template |= {"EXPERTS": 512, "RENORMALIZED": 0}
    code = compile_for_cuda(fused, inputs, [result, *[I32] * chooses], template)
    assert launches(registers(code), plan.threads)
    matvec = quantized_matvec.stream_plan(1024, 4096, bits, group_size, H200)
    assert matvec is not None
    template = {"T": BF16, "COLUMNS": 4096, "OUTPUTS": 1024, "BITS": bits, "GROUP": group_size} | dict(matvec.template)
    plain, added = (quantized_matvec.stream_kernel(matvec.shared_memory, False, residual) for residual in (False, True))
    inputs = [BF16, U32, BF16, BF16]
    assert compile_for_cuda(added if chooses else plain, [*inputs, *[BF16] * chooses], [BF16], template)
    normed = quantized_matvec.stream_kernel(matvec.shared_memory, with_norm=True)
    assert compile_for_cuda(normed, [*inputs, BF16], [BF16, BF16], template | {"EPS": kernel.bits_of(1e-6)})


@pytest.mark.parametrize("device", [H200, Gpu(170, 12, 101376)], ids=["Hopper", "small shared memory"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", PUBLISHED)
def test_plans_fit_into_shared_memory(name: str, bits: int, device: Gpu) -> None:
    geometry = GEOMETRIES[name]
    form = expert_format(RecordLayout.uniform(geometry.hidden, geometry.intermediate, bits, 64, "BF16"))
    assert form is not None
    plan = routed_experts.fused_plan(form, BF16, 1, 11, device)
    if plan is None:
        assert device is not H200
    else:
        assert plan.template["SLOTS"] >= 2
        assert plan.shared_memory <= device.shared_memory
    matvec = quantized_matvec.stream_plan(geometry.hidden, geometry.intermediate, bits, 64, device)
    assert matvec is not None
    assert matvec.shared_memory + 32 <= device.shared_memory, "with a norm, the kernel has 8 floats besides"
    filled = replace(device, shared_memory=matvec.shared_memory)
    tight = quantized_matvec.stream_plan(geometry.hidden, geometry.intermediate, bits, 64, filled)
    assert tight is None or tight.shared_memory + 32 <= filled.shared_memory


def test_older_gpus_keep_two_dispatches() -> None:
    form = expert_format(RecordLayout.uniform(4096, 1024, 4, 64, "BF16"))
    assert form is not None
    older = Gpu(multiprocessors=108, capability=8, shared_memory=166912)
    assert routed_experts.fused_plan(form, BF16, 1, 4, older) is None
    assert quantized_matvec.stream_plan(4096, 4096, 4, 64, older) is None


@pytest.mark.parametrize(
    ("device", "stages"),
    [(H200, 4), (Gpu(108, 8, 166912), 4), (Gpu(128, 8, 101376), 2), (Gpu(170, 12, 101376), 2), (Gpu(40, 7, 65536), 0)],
    ids=["H200", "A100", "Ada", "Blackwell with little memory", "Turing"],
)
def test_tiles_of_attention_in_flight(device: Gpu, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capability and memory come from NVIDIA's driver, as for all kernels."""
    monkeypatch.setattr(attention, "gpu", lambda: device)
    monkeypatch.setattr(attention, "dialect", lambda: "cuda")
    weights = cases.attention_inputs(GEOMETRIES["397B"], mx.bfloat16, context=1).weights
    assert attention.stages_on_tensor_cores(weights, mx.bfloat16) == stages


@needs_nvrtc
@pytest.mark.parametrize("dtype", DTYPES)
def test_choose_experts_compiles_for_cuda(dtype: mx.Dtype) -> None:
    template = {"T": dtype, "EXPERTS": 512, "WIDTH": 528, "CHOSEN": 10, "SHARED_EXPERT": 1, "RENORMALIZED": 0}
    assert compile_for_cuda(choose_experts.BODY, [dtype, I32], [I32, I32, F32], template)
    assert compile_for_cuda(choose_experts.LISTING, [dtype, I32, I32], [I32, I32, F32], template)


@needs_nvrtc
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, (3, 4, 8)])
def test_dense_experts_compile_for_cuda(bits: int | tuple[int, int, int], dtype: mx.Dtype) -> None:
    template = {
        name: value for name, value in EXPERTS.items() if name not in ("HIDDEN", "INTERMEDIATE", "CHOICES", "ROWS")
    }
    template |= {"T": dtype, "SIZE": 2**22, "THREADS": 256} | formats(bits, dtype)
    assert compile_for_cuda(dense_experts.BODY, [U8, I32], [dtype] * 3, template)


@needs_nvrtc
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.sampled(1)
def test_mixers_compile_for_cuda(dtype: mx.Dtype) -> None:
    heads = {"KEY_HEADS": 16, "VALUE_HEADS": 64, "KEY_DIM": 128, "VALUE_DIM": 128}
    eps = {"EPS": kernel.bits_of(1e-6)}
    template = {"T": dtype, "TAPS": 4, "ROWS": 8, "COLUMNS": 4, "THREADS": 512} | heads | eps
    types = [dtype] * 5 + [F32, F32, dtype, dtype, F32]
    assert compile_for_cuda(gated_delta_net.STEP, types, [dtype, dtype, F32], template)
    template = {"T": dtype, "HEADS": 32, "KV_HEADS": 2, "DIM": 256, "GATED": 1}
    parts = {"HEADS_AT_ONCE": 4, "WIDTH": 8, "SIMDGROUPS": 8, "MOST_SPANS": 64, "GROWTH": 256}
    for rows, bits, width in ((dtype, 0, 256), (mx.uint32, 8, 68), (mx.uint32, 4, 36)):
        cached = {"KV": rows, "ROW": width, "GROUP": 64, "BITS": bits}
        inputs = [dtype] * 5 + [rows] * 2 + [F32, I32]
        assert compile_for_cuda(attention.PREPARE, inputs, [dtype], template | {"ROTARY": 64} | eps | cached)
        assert compile_for_cuda(attention.DECODE, [dtype, rows, rows, I32], [F32, F32], template | cached | parts)
    assert compile_for_cuda(attention.MERGE, [F32, F32, dtype], [dtype], template | {"SIMDGROUPS": 8, "MOST_SPANS": 64})


@needs_nvrtc
@pytest.mark.parametrize(("width", "heads", "kv_heads", "rotary"), [(256, 32, 2, 64), (128, 32, 4, 128)])
@pytest.mark.parametrize(("stages", "architecture"), [(4, "sm_90a"), (2, "sm_89")])
def test_attention_on_tensor_cores_compiles_for_cuda(
    stages: int, architecture: str, width: int, heads: int, kv_heads: int, rotary: int
) -> None:
    decode = attention.decode_on_tensor_cores(width, stages)
    template = {"T": BF16, "HEADS": heads, "KV_HEADS": kv_heads, "DIM": width, "GATED": 0}
    template |= {"ROTARY": rotary, "EPS": 0}
    parts = {"KEYS": 32, "STAGES": stages, "SIMDGROUPS": 8, "MOST_SPANS": 64, "GROWTH": 256}
    assert compile_for_cuda(decode, [BF16] * 7 + [F32, I32], [F32, F32], template | parts, architecture)


@needs_nvrtc
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.sampled(3)
def test_quantized_matvec_compiles_for_cuda(bits: int, dtype: mx.Dtype) -> None:
    template = {"T": dtype, "S": dtype, "COLUMNS": 4096, "OUTPUTS": 1024, "BITS": bits, "GROUP": 64}
    template |= {"TOKENS": 1, "ROWS": 4, "THREADS": 128}
    inputs = [dtype, U32, dtype, dtype]
    assert compile_for_cuda(quantized_matvec.body_kernel(), inputs, [dtype], template)
    whole = quantized_matvec.body_kernel(with_norm=True, with_residual=True)
    assert compile_for_cuda(whole, [*inputs, dtype, dtype], [dtype, dtype], template | {"EPS": kernel.bits_of(1e-6)})


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_norm_and_residual_in_a_product(bits: int, dtype: mx.Dtype) -> None:
    for rows, columns in ((20, 384), (208, 3072)):
        check(cases.normed_matvec(rows, columns, dtype, bits=bits))
        check(cases.quantized_matvec(rows, columns, dtype, bits=bits, with_residual=True))


def test_unknown_preference() -> None:
    with pytest.raises(InputError) as caught:
        choose("fastest")
    assert caught.value.code == "unknown_kernels"


def test_names_of_implementations_on_a_cpu_without_the_extension(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "extension", lambda: None)
    with caplog.at_level(logging.WARNING):
        chosen = choose("auto")
    assert chosen.note is not None
    assert "install a C++ compiler" in chosen.note
    assert chosen.note in caplog.text
    assert chosen.routed_experts_cpu is None
    by_mlx, by_us = choose("mlx").names, chosen.names
    assert by_us == by_mlx | {"gated_delta_net of prompts": "chunks by numpy"}
    assert set(choose("reference").names.values()) == {"reference"}
