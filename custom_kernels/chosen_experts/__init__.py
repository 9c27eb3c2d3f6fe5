"""The choice of experts by their scores, and these experts; only kernels for GPUs need both as one operation."""

from flashmoe_mlx.custom_kernels.chosen_experts import gpu, reference
from flashmoe_mlx.custom_kernels.operation import Implementation, Operation

__all__ = ["OPERATION"]

OPERATION = Operation(
    name="chosen_experts",
    reference=reference.chosen_experts,
    mlx=reference.by_mlx,
    mlx_name=None,
    gpu=Implementation(gpu.chosen_experts, gpu.code_path, gpu.samples),
)
