"""The matrices of some experts, dequantized from their records; only prompts on CUDA use them."""

from flashmoe_mlx.custom_kernels.dense_experts import gpu, reference
from flashmoe_mlx.custom_kernels.operation import Implementation, Operation

__all__ = ["OPERATION"]

OPERATION = Operation(
    name="dense_experts",
    reference=reference.dense_experts,
    mlx=reference.dense_experts,
    mlx_name=None,
    gpu=Implementation(gpu.dense_experts, gpu.code_path, gpu.samples, dialects=("cuda",)),  # not measured on a Mac
)
