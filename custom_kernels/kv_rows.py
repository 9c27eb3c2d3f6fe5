"""Rows of a KV cache: the key or the value of one head of one token, as it is or quantized.

A quantized row is uint32: codes of ``bits`` bits in MLX's order, then a word for each group of codes, with the scale in
its lower half and the bias in its upper half, both in bf16. Every kernel reads and writes this layout.
"""

from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels.precision import widen

KV_BITS = (16, 8, 4)


@dataclass(frozen=True, slots=True)
class RowFormat:
    """The format of rows.

    Attributes:
        dim: values of a row.
        bits: 8 or 4 for codes, 16 for bf16, None for the type of activations.
    """

    dim: int
    bits: int | None = None

    @property
    def group_size(self) -> int:
        """The number of codes that share a scale and a bias."""
        return 64 if self.dim % 64 == 0 else 32

    @property
    def is_supported(self) -> bool:
        """Whether a row holds whole groups; always true for rows that are not quantized."""
        return not self.quantized or self.dim % self.group_size == 0

    @property
    def quantized(self) -> bool:
        """Whether rows hold codes."""
        return self.bits in (8, 4)

    @property
    def width(self) -> int:
        """The number of elements of an array for a row."""
        if self.bits is None or not self.quantized:
            return self.dim
        return self.dim * self.bits // 32 + self.dim // self.group_size

    def dtype(self, activations: mx.Dtype) -> mx.Dtype:
        """Return the type of an array of rows."""
        return mx.uint32 if self.quantized else mx.bfloat16 if self.bits == 16 else activations

    def nbytes(self, activation_bytes: int) -> int:
        """Return the bytes of a row for activations of ``activation_bytes`` bytes each."""
        return self.width * (4 if self.quantized else 2 if self.bits == 16 else activation_bytes)

    @property
    def phrase(self) -> str:
        """The format in the names of code paths; empty for rows in the type of activations."""
        return "" if self.bits is None else f"{self.bits}-bit keys and values"

    def pack(self, x: mx.array, activations: mx.Dtype) -> mx.array:
        """Return ``x`` [..., dim] as rows [..., width].

        The scale and the bias are rounded before the codes are computed, so an error is about half a step.
        """
        if not self.quantized:
            return x.astype(self.dtype(activations))
        assert self.bits is not None
        most, groups = 2**self.bits - 1, self.dim // self.group_size
        x = x.astype(mx.float32).reshape(*x.shape[:-1], groups, self.group_size)
        bias = x.min(-1, keepdims=True).astype(mx.bfloat16)
        scale = ((x.max(-1, keepdims=True) - bias.astype(mx.float32)) / most).astype(mx.bfloat16)
        step = mx.maximum(scale.astype(mx.float32), 1e-30)
        codes = mx.clip(mx.round((x - bias.astype(mx.float32)) / step), 0, most).astype(mx.uint32)
        per_word = 32 // self.bits
        words = codes.reshape(*x.shape[:-2], -1, per_word) << (mx.arange(per_word, dtype=mx.uint32) * self.bits)
        ends = mx.concatenate([scale, bias], axis=-1).view(mx.uint32).squeeze(-1)
        return mx.concatenate([words.sum(-1).astype(mx.uint32), ends], axis=-1)

    def unpack(self, rows: mx.array, dtype: mx.Dtype) -> mx.array:
        """Return ``rows`` [..., width] as values [..., dim] of type ``dtype``."""
        if not self.quantized:
            return rows.astype(dtype)
        assert self.bits is not None
        words = self.dim * self.bits // 32
        ends = mx.contiguous(rows[..., words:]).view(mx.bfloat16)
        ends = widen(ends).reshape(*rows.shape[:-1], self.dim // self.group_size, 2)
        codes = mx.contiguous(rows[..., :words])
        values = mx.dequantize(codes, ends[..., 0], ends[..., 1], group_size=self.group_size, bits=self.bits)
        return values.astype(dtype)
