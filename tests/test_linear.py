"""Several matrices as one."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.layers.linear import Linear, join, parts_of, project_all


def quantized(rows: int, bits: int = 4, group_size: int = 64, seed: int = 0) -> Linear:
    dense = np.random.default_rng(seed).standard_normal((rows, 128)).astype(np.float32)
    return Linear(*mx.quantize(mx.array(dense), group_size, bits), bits, group_size)


@pytest.mark.parametrize("counts", [(64, 1), (16, 32, 48), (5, 6, 7, 8)])
def test_joint_products(counts: tuple[int, ...]) -> None:
    linears = [quantized(count, seed=count) for count in counts]
    joined = join(linears)
    assert joined is not None
    matrix, views = joined
    assert matrix.weight.shape[0] == -(-sum(counts) // 16) * 16
    for tokens in (1, 3):
        x = mx.array(np.random.default_rng(tokens).standard_normal((tokens, 128)).astype(np.float32))
        expected = project_all(linears, x)
        together = [parts_of(matrix(x), views)] if tokens == 1 else []
        for found in (project_all(views, x), *together):
            assert len(found) == len(linears)
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(np.array(one), np.array(other))
    rest = matrix(mx.ones((1, 128)))[:, sum(counts) :]
    assert not np.array(rest).any()


def test_matrices_that_stay_apart() -> None:
    first = quantized(16)
    assert join([first, quantized(16, bits=8)]) is None
    assert join([first, quantized(16, group_size=32)]) is None
    assert join([first, Linear(mx.zeros((16, 128)))]) is None
    assert join([first, replace(first, bias=mx.zeros(16))]) is None
