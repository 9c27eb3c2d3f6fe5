"""GatedDeltaNet: a short convolution, then the gated delta rule in place of attention.

Source: transformers ``Qwen3_5MoeGatedDeltaNet``.
"""

from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import Kernels
from flashmoe_mlx.model.cache import DeltaCache
from flashmoe_mlx.model.config import ModelConfig
from flashmoe_mlx.model.linear import Linear

_L2_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class GatedDeltaNet:
    """One layer's weights; ``conv`` [channels, kernel, 1], ``a_log`` and ``dt_bias`` f32 [value heads]."""

    config: ModelConfig
    kernels: Kernels
    in_proj_qkv: Linear
    in_proj_z: Linear
    in_proj_b: Linear
    in_proj_a: Linear
    out_proj: Linear
    conv: mx.array
    a_log: mx.array
    dt_bias: mx.array
    norm: mx.array

    def __call__(self, x: mx.array, cache: DeltaCache) -> mx.array:
        """[T, hidden] -> [T, hidden] after the tokens already in ``cache``."""
        config, length = self.config, x.shape[0]
        mixed = self._convolve(self.in_proj_qkv(x), cache)
        queries, keys, values = mx.split(mixed, [config.key_width, 2 * config.key_width], axis=-1)
        queries = queries.reshape(1, length, config.linear_key_heads, config.linear_key_dim)
        keys = keys.reshape(1, length, config.linear_key_heads, config.linear_key_dim)
        values = values.reshape(1, length, config.linear_value_heads, config.linear_value_dim)
        queries = _l2_normalised(queries) * config.linear_key_dim**-0.5
        keys = _l2_normalised(keys)

        beta = mx.sigmoid(self.in_proj_b(x))[None]
        rate = mx.exp(self.a_log) * _softplus(self.in_proj_a(x).astype(mx.float32) + self.dt_bias)
        y, cache.state = self.kernels.gated_delta(
            queries, keys, values, mx.exp(-rate)[None], beta.astype(mx.float32), cache.state
        )

        z = self.in_proj_z(x).reshape(length, config.linear_value_heads, config.linear_value_dim).astype(mx.float32)
        y = mx.fast.rms_norm(y.squeeze(0).astype(mx.float32), self.norm.astype(mx.float32), config.rms_norm_eps)
        y = (y * (z * mx.sigmoid(z))).astype(x.dtype)
        return self.out_proj(y.reshape(length, config.value_width))

    def _convolve(self, x: mx.array, cache: DeltaCache) -> mx.array:
        """Causal depthwise convolution and SiLU over [T, channels]; multiplications beat MLX's convolution here."""
        kernel, length = self.config.linear_conv_kernel, x.shape[0]
        if cache.conv is None:
            cache.conv = mx.zeros((kernel - 1, x.shape[1]), x.dtype)
        padded = mx.concatenate([cache.conv, x])
        # Contiguous, or the slice would keep the whole chunk alive.
        cache.conv = mx.contiguous(padded[length:])
        y = sum(padded[tap : tap + length] * self.conv[:, tap, 0] for tap in range(kernel))
        assert isinstance(y, mx.array)
        return y * mx.sigmoid(y)


def _l2_normalised(x: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    return (wide * mx.rsqrt((wide * wide).sum(-1, keepdims=True) + _L2_EPS)).astype(x.dtype)


def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, 0)
