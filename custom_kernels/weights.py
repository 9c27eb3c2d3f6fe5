"""The weights of layers, in the form that kernels read."""

from dataclasses import dataclass, field
from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels.kv_rows import RowFormat
from flashmoe_mlx.custom_kernels.precision import widen
from flashmoe_mlx.formats.record import FLOAT_MODES


@cache
def format_name(bits: int, group_size: int, scales: mx.Dtype) -> str:
    """Return a format of quantized matrices in words, for the names of code paths."""
    if scales == mx.uint8:
        return next(mode for mode, sizes in FLOAT_MODES.items() if sizes == (bits, group_size))
    return f"{bits} bits in groups of {group_size}, scales {str(scales).rpartition('.')[2]}"


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix [out, in] in MLX's affine format, or a dense matrix where ``bits`` is None.

    Attributes:
        weight: codes, uint32 [out, in * bits / 32]; or the dense matrix.
        scales: [out, in / group_size], in any type of floats.
        biases: shape and type of ``scales``.
        bits: width of a code.
        group_size: codes that share a scale and a bias.
        mode: MLX's mode of quantization; other modes than "affine" have scales of one byte and no biases. Kernels for
            CPUs compute with "mxfp4", and only MLX's operations with the rest.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int | None = None
    group_size: int | None = None
    mode: str = field(default="affine", kw_only=True)

    @property
    def format_name(self) -> str:
        """The format of a quantized matrix in words."""
        assert self.bits is not None
        assert self.group_size is not None
        assert self.scales is not None
        return format_name(self.bits, self.group_size, self.scales.dtype)

    @property
    def columns(self) -> int:
        """The number of weights in a row."""
        if self.bits is None:
            return int(self.weight.shape[1])
        assert self.scales is not None
        assert self.group_size is not None
        return int(self.scales.shape[1]) * self.group_size

    def dense(self) -> mx.array:
        """Return the dense matrix, f32 [out, in]."""
        if self.bits is None:
            return widen(self.weight)
        assert self.scales is not None
        if self.biases is None:
            sizes = self.group_size, self.bits
            return mx.dequantize(self.weight, self.scales, None, *sizes, self.mode, dtype=mx.float32)
        return mx.dequantize(
            self.weight,
            self.scales.astype(mx.float32),
            self.biases.astype(mx.float32),
            group_size=self.group_size,
            bits=self.bits,
        )


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The three matrices of an expert."""

    gate: QuantizedWeight
    up: QuantizedWeight
    down: QuantizedWeight

    @property
    def matrices(self) -> tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]:
        """Gate, up and down."""
        return self.gate, self.up, self.down


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Weights and sizes of a full-attention layer, without its projections.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads; each serves heads / kv_heads consecutive query heads.
        head_dim: D, the width of a head.
        rotary_dim: the first dimensions of a head, which are rotated in pairs.
        theta: base of the rotation: pair i turns by ``theta ** (-2 i / rotary_dim)`` radians per position.
        q_norm: RMS norm of queries, [D].
        k_norm: RMS norm of keys, [D].
        eps: epsilon of both norms.
        frequencies: radians per position of each pair, in place of the powers of ``theta``.
        kv_bits: the width of cached keys and values; see ``kv_rows.RowFormat``.
        gated: whether a gate beside every query multiplies the result of its head.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    theta: float
    q_norm: mx.array
    k_norm: mx.array
    eps: float
    frequencies: tuple[float, ...] | None = None
    kv_bits: int | None = None
    gated: bool = True

    @property
    def query_width(self) -> int:
        """The columns of a head in the projection of queries: D, or 2 D with its gate."""
        return self.head_dim * (2 if self.gated else 1)

    @property
    def gate_phrase(self) -> str:
        """A phrase for the names of code paths; empty with gates."""
        return "" if self.gated else "without gates"

    @property
    def rows(self) -> RowFormat:
        """The format of cached keys and values."""
        return RowFormat(self.head_dim, self.kv_bits)

    def rotations(self) -> npt.NDArray[np.float64]:
        """Return the radians per position of each pair, [rotary_dim / 2]."""
        return rotations(self.rotary_dim, self.theta, self.frequencies)


@cache
def rotations(rotary_dim: int, theta: float, frequencies: tuple[float, ...] | None) -> npt.NDArray[np.float64]:
    """Return the radians per position of each pair, [rotary_dim / 2]: ``frequencies``, else powers of ``theta``."""
    pairs = rotary_dim // 2
    table = np.asarray(theta ** (-np.arange(pairs) / pairs) if frequencies is None else frequencies, np.float64)
    table.setflags(write=False)  # the cache hands out one array
    return table


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """Weights and sizes of a GatedDeltaNet layer, without its projections.

    Attributes:
        key_heads: heads of queries and keys.
        value_heads: heads of values; each key head serves value_heads / key_heads consecutive value heads.
        key_dim: Dk, the width of a key head.
        value_dim: Dv, the width of a value head.
        convolution: [channels, taps, 1], over the channels of q, k and v in this order.
        a_log: logarithm of the decay rate, f32 [value_heads].
        dt_bias: f32 [value_heads].
        norm: RMS norm of the outputs, [Dv].
        eps: epsilon of the norm.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    convolution: mx.array
    a_log: mx.array
    dt_bias: mx.array
    norm: mx.array
    eps: float

    @property
    def taps(self) -> int:
        """The number of tokens under the convolution."""
        return self.convolution.shape[1]

    def empty(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Return the convolution state and the recurrent state of an empty sequence."""
        conv_state = mx.zeros((self.taps - 1, self.convolution.shape[0]), dtype)
        return conv_state, mx.zeros((1, self.value_heads, self.value_dim, self.key_dim))
