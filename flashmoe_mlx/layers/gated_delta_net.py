"""GatedDeltaNet: a short convolution, then the gated delta rule in place of attention.

Source: transformers ``Qwen3_5MoeGatedDeltaNet``.
"""

from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import DeltaInputs, DeltaWeights, Kernels
from flashmoe_mlx.layers.cache import DeltaCache
from flashmoe_mlx.layers.linear import Linear, together


@dataclass(frozen=True, slots=True)
class GatedDeltaNet:
    """One layer's weights."""

    weights: DeltaWeights
    kernels: Kernels
    in_proj_qkv: Linear
    in_proj_z: Linear
    in_proj_b: Linear
    in_proj_a: Linear
    out_proj: Linear

    def __call__(self, x: mx.array, cache: DeltaCache, before: mx.array) -> mx.array:
        """[T, hidden] -> [T, hidden] after the tokens already in ``cache``, added to ``before``."""
        if cache.conv is None or cache.state is None:
            cache.conv, cache.state = self.weights.empty(x.dtype)
        qkv, z, b, a = together((self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a), x)
        y, cache.conv, cache.state = self.kernels.gated_delta_net(
            DeltaInputs(qkv, z, b, a, self.weights, cache.conv, cache.state)
        )
        return self.out_proj(y, before)
