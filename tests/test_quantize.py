"""Least squares is never worse than min-max in any group, and its result has the format of MLX."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flashmoe_mlx.formats.record import GROUP_SIZES, QUANTIZED_BITS
from flashmoe_mlx.pack.least_squares import least_squares
from flashmoe_mlx.pack.quantize import default_quantizer

Quantized = tuple[mx.array, mx.array, mx.array]


def unpacked(words: mx.array, bits: int) -> npt.NDArray[np.int64]:
    """Return the codes of words whose bits are in order of significance."""
    stream = np.unpackbits(np.array(words).view(np.uint8), axis=-1, bitorder="little")
    return stream.reshape(*stream.shape[:-1], -1, bits) @ (1 << np.arange(bits))


def errors(dense: mx.array, quantized: Quantized, bits: int, group_size: int) -> npt.NDArray[np.float64]:
    """Return the squared error of each group in f64."""
    codes, scales, biases = quantized
    levels = unpacked(codes, bits).reshape(*scales.shape, group_size)
    scale, bias = (np.array(part.astype(mx.float32), np.float64)[..., None] for part in (scales, biases))
    values = np.array(dense.astype(mx.float32), np.float64).reshape(levels.shape)
    return np.square(scale * levels + bias - values).sum(-1)  # type: ignore[no-any-return]


def by_mlx(dense: mx.array, bits: int, group_size: int) -> Quantized:
    codes, scales, biases = mx.quantize(dense, group_size=group_size, bits=bits)
    return codes, scales, biases


def normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", QUANTIZED_BITS)
def test_the_result_has_the_format_of_mlx(bits: int, group_size: int, dtype: mx.Dtype) -> None:
    dense = normal((3, 5, 256), dtype)
    made, theirs = least_squares(dense, bits, group_size), by_mlx(dense, bits, group_size)
    assert [(part.shape, part.dtype) for part in made] == [(part.shape, part.dtype) for part in theirs]
    codes, scales, biases = made
    exact = [part.astype(mx.float32) for part in (scales, biases)]
    read = np.array(mx.dequantize(codes, *exact, group_size=group_size, bits=bits))
    levels = unpacked(codes, bits).reshape(*scales.shape, group_size)
    scale, bias = (np.array(part)[..., None] for part in exact)
    np.testing.assert_allclose(read.reshape(levels.shape), scale * levels + bias, rtol=1e-6, atol=1e-6)
    ours, minmax = errors(dense, made, bits, group_size), errors(dense, theirs, bits, group_size)
    assert (ours <= minmax * (1 + 1e-5)).all()
    assert ours.sum() < minmax.sum()


def test_the_error_in_2_bits() -> None:
    """The squared error falls by about a third, close to the optimum of four equidistant levels."""
    dense = normal((64, 1024), mx.bfloat16)
    ours, minmax = (errors(dense, made, 2, 64).sum() for made in (least_squares(dense, 2, 64), by_mlx(dense, 2, 64)))
    assert ours < 0.70 * minmax
    # Max, "Quantizing for minimum distortion", 1960: the optimum for a normal source is 0.1188.
    assert ours < 0.1188 * np.square(np.array(dense.astype(mx.float32))).sum()


VALUES = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e-38, 1e-45, 3e38, -3e38])


@settings(max_examples=150, deadline=None)
@given(values=arrays(np.float32, (1, 64), elements=VALUES), bits=st.sampled_from(QUANTIZED_BITS))
def test_the_error_is_never_larger(values: npt.NDArray[np.float32], bits: int) -> None:
    """Values may be constant, zero, far apart, or too small or too large to square."""
    dense = mx.array(values).astype(mx.bfloat16)
    if not mx.isfinite(dense).all().item():
        return  # rounded to infinity, which packing refuses
    made, theirs = least_squares(dense, bits, 32), by_mlx(dense, bits, 32)
    if not all(mx.isfinite(part).all().item() for part in theirs[1:]):
        return  # the range overflows, so the result of MLX is not finite either
    assert all(mx.isfinite(part).all().item() for part in made[1:])
    largest = float(np.abs(values).max())
    ours, minmax = errors(dense, made, bits, 32), errors(dense, theirs, bits, 32)
    assert (ours <= minmax * (1 + 1e-3) + 1e-9 * largest**2).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-15, 1e15])
def test_constant_groups_are_exact(value: float) -> None:
    dense = mx.full((2, 64), value, mx.bfloat16)
    codes, scales, biases = least_squares(dense, 2, 64)
    assert mx.array_equal(mx.dequantize(codes, scales, biases, group_size=64, bits=2), dense).item()


def test_default_quantizer_of_each_width() -> None:
    assert {bits: default_quantizer(bits) for bits in QUANTIZED_BITS} == dict.fromkeys(QUANTIZED_BITS, "minmax") | {
        2: "least_squares"
    }
