"""What runs equals its plain reference: on the CPU every day, on GPUs with ``-m metal`` or ``-m cuda``."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.custom_kernels import PREFERENCES, choose
from flashmoe_mlx.custom_kernels.expert_mlp import ExpertWeights, Weight

DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("metal", id="metal", marks=pytest.mark.metal),
    pytest.param("cuda", id="cuda", marks=pytest.mark.cuda),
]
TOLERANCE = {mx.float32: 2e-5, mx.bfloat16: 2e-2}
DTYPES = [pytest.param(mx.float32, id="f32"), pytest.param(mx.bfloat16, id="bf16")]


@pytest.fixture(params=DEVICES)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def assert_equal(got: mx.array, expected: mx.array, dtype: mx.Dtype) -> None:
    assert got.shape == expected.shape
    got, expected = np.array(got.astype(mx.float32)), np.array(expected.astype(mx.float32))
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max())


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 32), (6, 2, 64), (32, 2, 256)])
@pytest.mark.parametrize(("length", "span"), [(1, 1), (1, 37), (5, 5), (7, 40), (33, 65)])
def test_attention(heads: int, kv_heads: int, width: int, length: int, span: int, dtype: mx.Dtype) -> None:
    queries = normal((1, heads, length, width), dtype, 0)
    keys, values = normal((1, kv_heads, span, width), dtype, 1), normal((1, kv_heads, span, width), dtype, 2)
    got, expected = (choose(preference).attention(queries, keys, values) for preference in PREFERENCES)
    assert_equal(got, expected, dtype)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("key_heads", "heads", "key_width", "width"), [(2, 4, 32, 32), (3, 3, 64, 32), (16, 64, 128, 128)]
)
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("continued", [False, True])
def test_gated_delta(
    key_heads: int, heads: int, key_width: int, width: int, length: int, continued: bool, dtype: mx.Dtype
) -> None:
    def unit(array: mx.array) -> mx.array:
        return (array / mx.linalg.norm(array.astype(mx.float32), axis=-1, keepdims=True)).astype(dtype)

    queries, keys = (unit(normal((1, length, key_heads, key_width), dtype, seed)) for seed in (0, 1))
    values = normal((1, length, heads, width), dtype, 2)
    decay, beta = (mx.sigmoid(normal((1, length, heads), mx.float32, seed)) for seed in (3, 4))
    state = normal((1, heads, width, key_width), mx.float32, 5) if continued else None
    got, expected = (
        choose(preference).gated_delta(queries, keys, values, decay, beta, state) for preference in PREFERENCES
    )
    assert_equal(got[0], expected[0], dtype)
    assert got[1].dtype == expected[1].dtype == mx.float32
    assert_equal(got[1], expected[1], dtype)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("bits", [None, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("tokens", [1, 5])
def test_expert_mlp(bits: int | None, group_size: int, tokens: int) -> None:
    def weight(rows: int, columns: int, seed: int) -> Weight:
        dense = normal((rows, columns), mx.float32, seed) * columns**-0.5
        if bits is None:
            return Weight(dense)
        return Weight(*mx.quantize(dense, group_size=group_size, bits=bits), bits, group_size)

    expert = ExpertWeights(weight(192, 128, 0), weight(192, 128, 1), weight(128, 192, 2))
    x = normal((tokens, 128), mx.float32, 3)
    got, expected = (choose(preference).expert_mlp(x, expert) for preference in PREFERENCES)
    assert_equal(got, expected, mx.float32)


def test_unknown_preference() -> None:
    with pytest.raises(ValueError, match="choose from auto, reference"):
        choose("fastest")
