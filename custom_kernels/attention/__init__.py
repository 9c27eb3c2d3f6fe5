"""The part of a full-attention layer between its projections."""

from flashmoe_mlx.custom_kernels.attention import cpu, gpu, mlx, reference
from flashmoe_mlx.custom_kernels.operation import Implementation, Operation

__all__ = ["OPERATION"]

OPERATION = Operation(
    name="attention",
    reference=reference.gated_attention,
    mlx=mlx.gated_attention,
    mlx_name="mx.fast.scaled_dot_product_attention",
    gpu=Implementation(gpu.gated_attention, gpu.code_path, gpu.samples),
    cpu=Implementation(cpu.gated_attention, cpu.code_path, cpu.samples),
)
