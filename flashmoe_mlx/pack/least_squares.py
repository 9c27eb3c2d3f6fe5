"""Affine quantisation with the scale and bias of each group chosen for the least squared error.

``mx.quantize`` spreads its codes from the smallest to the largest value of a group. With few bits that spends them on
the extremes: of 64 normal numbers in 2 bits, the best four levels span about six tenths of the range. So from several
ranges, narrowed towards the middle, codes and (scale, bias) are improved in turn (the nearest codes of a line, then the
line of least squares through the values of each code: Lloyd's method with levels that keep equal distances), and the
best of all, min-max included, is kept for each group.
"""

import mlx.core as mx

_RANGES = (1.0, 0.65)
_STEPS = 4
"""More of either buys less than half a per cent of the error: docs/measurements/2026-11-24-two-bit.md."""
_WORD_BITS = 32


def least_squares(dense: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases of ``dense`` [..., out, in], in the form of ``mx.quantize``.

    Codes are uint32 words [..., out, in * bits / 32], least significant bit first; scales and biases [..., out,
    in / group_size] have the type of ``dense``. In no group is the squared error of ``scale * code + bias`` larger than
    that of ``mx.quantize``.
    """
    most = 2**bits - 1
    dtype, shape = dense.dtype, dense.shape
    values = dense.astype(mx.float32).reshape(*shape[:-1], -1, group_size)
    _, scales, biases = mx.quantize(dense, group_size=group_size, bits=bits)
    best = _Lines(values, scales, biases, most)
    low, high = values.min(-1), values.max(-1)
    for share in _RANGES:
        scale = (high - low) * (share / most)
        bias = (low + high) / 2 - scale * (most / 2)
        for _ in range(_STEPS):
            scale, bias = _fitted(values, _nearest(values, scale, bias, most), scale, bias)
        best.take_better(_Lines(values, scale.astype(dtype), bias.astype(dtype), most))
    return _packed(best.codes.reshape(shape), bits), best.scales, best.biases


class _Lines:
    """A scale and a bias for each group, as they will be stored, with the nearest codes and the squared error."""

    def __init__(self, values: mx.array, scales: mx.array, biases: mx.array, most: int) -> None:
        self.scales, self.biases = scales, biases
        scale, bias = scales.astype(mx.float32), biases.astype(mx.float32)
        self.codes = _nearest(values, scale, bias, most)
        self.errors = mx.square(self.codes * scale[..., None] + bias[..., None] - values).sum(-1)
        mx.eval(self.scales, self.biases, self.codes, self.errors)

    def take_better(self, other: "_Lines") -> None:
        """Of each group, the one with the smaller error; what overflowed to infinity or NaN is never smaller."""
        better = other.errors < self.errors
        self.scales = mx.where(better, other.scales, self.scales)
        self.biases = mx.where(better, other.biases, self.biases)
        self.codes = mx.where(better[..., None], other.codes, self.codes)
        self.errors = mx.where(better, other.errors, self.errors)
        mx.eval(self.scales, self.biases, self.codes, self.errors)


def _nearest(values: mx.array, scale: mx.array, bias: mx.array, most: int) -> mx.array:
    """The codes, as f32, of the levels nearest to ``values`` [..., groups, group size]; 0 where there is one level."""
    inverse = mx.where(scale == 0, 0.0, 1 / mx.where(scale == 0, 1.0, scale))
    codes = mx.round((values - bias[..., None]) * inverse[..., None])
    return mx.clip(mx.where(mx.isnan(codes), 0.0, codes), 0, most)


def _fitted(values: mx.array, codes: mx.array, scale: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """The line of least squares through (code, value) of each group; the old one where all codes are equal."""
    code_mean, value_mean = codes.mean(-1), values.mean(-1)
    centred = codes - code_mean[..., None]
    spread = mx.square(centred).sum(-1)
    slope = (centred * (values - value_mean[..., None])).sum(-1) / mx.where(spread == 0, 1.0, spread)
    fits = spread > 0
    return mx.where(fits, slope, scale), mx.where(fits, value_mean - slope * code_mean, bias)


def _packed(codes: mx.array, bits: int) -> mx.array:
    """Codes [..., n] as uint32 words [..., n * bits / 32]; a code may straddle two words."""
    spread = mx.arange(bits, dtype=mx.uint32)
    ones = mx.bitwise_and(mx.right_shift(codes.astype(mx.uint32)[..., None], spread), mx.array(1, mx.uint32))
    words = ones.reshape(*codes.shape[:-1], -1, _WORD_BITS)
    return mx.left_shift(words, mx.arange(_WORD_BITS, dtype=mx.uint32)).sum(-1).astype(mx.uint32)
