"""Affine quantization that chooses the scale and bias of each group for a small squared error.

``mx.quantize`` spreads its codes from the smallest to the largest value of a group. With few bits this wastes codes on
the extremes: for 64 normal numbers in 2 bits, the best four levels span about six tenths of the range. This module
starts from several ranges, narrowed toward the middle. From each it improves codes and (scale, bias) alternately: first
the nearest codes, then the line of least squares through the values of each code. This is Lloyd's method with levels at
equal distances. The best result for each group is kept, including that of ``mx.quantize``.
"""

import mlx.core as mx

_RANGES = (1.0, 0.65)
_STEPS = 4
"""More ranges or steps reduce the error by less than half a percent: docs/measurements/2026-11-24-two-bit.md."""
_WORD_BITS = 32


def least_squares(dense: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize ``dense`` [..., out, in] to codes, scales, and biases in the form of ``mx.quantize``.

    In no group is the squared error of ``scale * code + bias`` larger than with ``mx.quantize``.

    Args:
        dense: weights in a float type.
        bits: width of a code.
        group_size: number of weights along the input dimension that share a scale and a bias.

    Returns:
        Codes as uint32 words [..., out, in * bits / 32], least significant bit first, and scales and biases [..., out,
        in / group_size] of the type of ``dense``.
    """
    max_code = 2**bits - 1
    dtype, shape = dense.dtype, dense.shape
    values = dense.astype(mx.float32).reshape(*shape[:-1], -1, group_size)
    _, scales, biases = mx.quantize(dense, group_size=group_size, bits=bits)
    best = _Candidate(values, scales, biases, max_code)
    low, high = values.min(-1), values.max(-1)
    for fraction in _RANGES:
        scale = (high - low) * (fraction / max_code)
        bias = (low + high) / 2 - scale * (max_code / 2)
        for _ in range(_STEPS):
            scale, bias = _fitted(values, _nearest(values, scale, bias, max_code), scale, bias)
        best.take_better(_Candidate(values, scale.astype(dtype), bias.astype(dtype), max_code))
    return _packed(best.codes.reshape(shape), bits), best.scales, best.biases


class _Candidate:
    """A scale and a bias for each group in their stored type, with the nearest codes and the squared error."""

    def __init__(self, values: mx.array, scales: mx.array, biases: mx.array, max_code: int) -> None:
        self.scales, self.biases = scales, biases
        scale, bias = scales.astype(mx.float32), biases.astype(mx.float32)
        self.codes = _nearest(values, scale, bias, max_code)
        self.errors = mx.square(self.codes * scale[..., None] + bias[..., None] - values).sum(-1)
        mx.eval(self.scales, self.biases, self.codes, self.errors)

    def take_better(self, candidate: "_Candidate") -> None:
        """Replace each group by that of ``candidate`` if its error is smaller; infinite and NaN errors never are."""
        better = candidate.errors < self.errors
        self.scales = mx.where(better, candidate.scales, self.scales)
        self.biases = mx.where(better, candidate.biases, self.biases)
        self.codes = mx.where(better[..., None], candidate.codes, self.codes)
        self.errors = mx.where(better, candidate.errors, self.errors)
        mx.eval(self.scales, self.biases, self.codes, self.errors)


def _nearest(values: mx.array, scale: mx.array, bias: mx.array, max_code: int) -> mx.array:
    """Return the codes (f32) of the levels nearest to ``values`` [..., groups, group size]; 0 if the scale is 0."""
    inverse = mx.where(scale == 0, 0.0, 1 / mx.where(scale == 0, 1.0, scale))
    codes = mx.round((values - bias[..., None]) * inverse[..., None])
    return mx.clip(mx.where(mx.isnan(codes), 0.0, codes), 0, max_code)


def _fitted(values: mx.array, codes: mx.array, scale: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """Return the line of least squares through (code, value) of each group; (scale, bias) where all codes are equal."""
    code_mean, value_mean = codes.mean(-1), values.mean(-1)
    centered = codes - code_mean[..., None]
    spread = mx.square(centered).sum(-1)
    slope = (centered * (values - value_mean[..., None])).sum(-1) / mx.where(spread == 0, 1.0, spread)
    has_slope = spread > 0
    return mx.where(has_slope, slope, scale), mx.where(has_slope, value_mean - slope * code_mean, bias)


def _packed(codes: mx.array, bits: int) -> mx.array:
    """Pack codes [..., n] into uint32 words [..., n * bits / 32]; a code may straddle two words."""
    positions = mx.arange(bits, dtype=mx.uint32)
    ones = mx.bitwise_and(mx.right_shift(codes.astype(mx.uint32)[..., None], positions), mx.array(1, mx.uint32))
    words = ones.reshape(*codes.shape[:-1], -1, _WORD_BITS)
    return mx.left_shift(words, mx.arange(_WORD_BITS, dtype=mx.uint32)).sum(-1).astype(mx.uint32)
