"""Attention of the new tokens of several sequences in one call; only kernels for CPUs need it as one operation."""

from flashmoe_mlx.custom_kernels.attention_batch import cpu, reference
from flashmoe_mlx.custom_kernels.operation import Implementation, Operation

__all__ = ["OPERATION"]

OPERATION = Operation(
    name="attention_batch",
    reference=reference.gated_attention,
    mlx=reference.by_mlx,
    mlx_name=None,
    cpu=Implementation(cpu.gated_attention, cpu.code_path, cpu.samples),
)
