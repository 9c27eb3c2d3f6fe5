"""The SwiGLU MLP of one expert, from its record in place."""

from flashmoe_mlx.custom_kernels.expert_mlp import mlx, reference
from flashmoe_mlx.custom_kernels.operation import Operation

__all__ = ["OPERATION"]

OPERATION = Operation(
    name="expert_mlp",
    reference=reference.expert_mlp,
    mlx=mlx.expert_mlp,
    mlx_name="mx.quantized_matmul or, of dense records, matmul",
)
