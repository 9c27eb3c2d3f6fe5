"""Kernels that select rows: the embedding, and the tokens and outputs of experts in a prompt."""

from collections.abc import Callable

import gpu_on_cpu
import mlx.core as mx
import numpy as np
import pytest
from systems import needs_linux

from flashmoe_mlx.custom_kernels import operations
from flashmoe_mlx.custom_kernels.checks import CheckedKernel
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.shapes import ModelShapes

NAMES = ("add_rows", "embedding", "gather_rows")
FORMATS = [(2, 64), (3, 32), (4, 64), (6, 32), (8, 128)]


def check(name: str, bits: int, group_size: int, dtype: mx.Dtype) -> None:
    table = RandomInputs(dtype, 1).quantized(8, 384, bits, group_size)
    model = ModelShapes(dtype, 384, (), (), (), (), (), 3, 8, 8, table)
    kernel = operations()[name].on("cuda")
    assert isinstance(kernel, CheckedKernel)
    verdicts = kernel.check(kernel.samples(model))
    assert verdicts
    assert [verdict.replaced for verdict in verdicts] == [None] * len(verdicts)


@needs_linux
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_emulated(name: str, dtype: mx.Dtype) -> None:
    with gpu_on_cpu.cuda(dtype) as launches:
        for bits, group_size in FORMATS if name == "embedding" else FORMATS[:1]:
            check(name, bits, group_size, dtype)
        assert launches[f"{name}_body"] > 0


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_on_cuda(name: str, dtype: mx.Dtype, bits: int, group_size: int) -> None:
    check(name, bits, group_size, dtype)


@pytest.mark.parametrize("implementation", ["reference", "mlx"])
def test_references(implementation: str) -> None:
    def of(name: str) -> Callable[..., mx.array]:
        found: Callable[..., mx.array] = getattr(operations()[name], implementation)
        return found

    random = np.random.default_rng(0)
    rows, y, weights = (random.standard_normal(shape).astype(np.float32) for shape in ((7, 8), (3, 8), (3, 2)))
    places = np.array([[0, -1], [6, 6], [-1, -1]], np.int32)
    expected = y.copy()
    for token, k in np.argwhere(places >= 0):
        expected[token] += weights[token, k] * rows[places[token, k]]
    sums = of("add_rows")(*map(mx.array, (y, rows, places, weights)))
    np.testing.assert_allclose(np.array(sums), expected, rtol=1e-5)
    np.testing.assert_array_equal(np.array(of("gather_rows")(mx.array(rows), mx.array([6, 0, 6]))), rows[[6, 0, 6]])
    table = RandomInputs(mx.float32, 0).quantized(5, 64, 4, 32)
    picked = of("embedding")(table, mx.array([4, 4, 1]), mx.float32)
    np.testing.assert_array_equal(np.array(picked), np.array(table.dense())[[4, 4, 1]])
