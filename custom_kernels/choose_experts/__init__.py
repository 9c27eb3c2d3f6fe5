"""The choice of experts by their scores, with weights; only kernels for GPUs need it as one operation."""

from flashmoe_mlx.custom_kernels.choose_experts import gpu, reference
from flashmoe_mlx.custom_kernels.operation import Implementation, Operation

__all__ = ["OPERATION"]

OPERATION = Operation(
    name="choose_experts",
    reference=reference.choose_experts,
    mlx=reference.choose_experts,
    mlx_name=None,
    gpu=Implementation(gpu.choose_experts, gpu.code_path, gpu.samples),
)
