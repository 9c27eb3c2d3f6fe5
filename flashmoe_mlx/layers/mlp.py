"""The MLP of a layer without routed experts.

Source: transformers ``Qwen3MoeMLP``.
"""

from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import Kernels
from flashmoe_mlx.layers.linear import Linear, project_all
from flashmoe_mlx.layers.sequences import BLOCK


@dataclass(frozen=True, slots=True)
class Mlp:
    """An MLP behind a norm: down(silu(gate x) * up x)."""

    kernels: Kernels
    norm: mx.array
    eps: float
    gate: Linear
    up: Linear
    down: Linear

    def __call__(self, residual: mx.array) -> mx.array:
        """Return the residual stream [T, hidden] plus its MLP; many tokens in blocks, which are evaluated."""
        if len(residual) <= BLOCK:
            return self._apply(residual)
        blocks = []
        for start in range(0, len(residual), BLOCK):
            blocks.append(self._apply(residual[start : start + BLOCK]))
            mx.eval(blocks[-1])
        return mx.concatenate(blocks)

    def _apply(self, residual: mx.array) -> mx.array:
        x = self.kernels.rms_norm(residual, self.norm, self.eps)
        gate, up = project_all((self.gate, self.up), x)
        return self.down(gate * mx.sigmoid(gate) * up, residual)
