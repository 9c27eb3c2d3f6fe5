"""The SwiGLU MLP of one routed expert in elementary operations."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from flashmoe_mlx.custom_kernels.precision import wide


@cache
def format_name(bits: int, group_size: int, scales: mx.Dtype) -> str:
    """Name a format of quantised matrices in words."""
    return f"{bits} bits in groups of {group_size}, scales {str(scales).rpartition('.')[2]}"


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix [out, in]: dense if ``bits`` is None, else MLX affine codes with ``scales`` and ``biases``."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int | None = None
    group_size: int | None = None

    @property
    def format_name(self) -> str:
        """The format in words, for a quantised matrix."""
        assert self.bits is not None
        assert self.group_size is not None
        assert self.scales is not None
        return format_name(self.bits, self.group_size, self.scales.dtype)

    @property
    def columns(self) -> int:
        """The length of a row, in weights."""
        if self.bits is None:
            return int(self.weight.shape[1])
        assert self.scales is not None
        assert self.group_size is not None
        return int(self.scales.shape[1]) * self.group_size

    def dense(self) -> mx.array:
        """The matrix itself, f32 [out, in]."""
        if self.bits is None:
            return wide(self.weight)
        assert self.scales is not None
        assert self.biases is not None
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

    gate: Weight
    up: Weight
    down: Weight


def expert_mlp(x: mx.array, expert: ExpertWeights) -> mx.array:
    """down(silu(gate x) * up x) for ``x`` [T, hidden]; computed in f32, returned in the type of ``x``."""
    x_wide = wide(x)
    gate, up = x_wide @ expert.gate.dense().T, x_wide @ expert.up.dense().T
    return ((gate * mx.sigmoid(gate) * up) @ expert.down.dense().T).astype(x.dtype)
