"""GatedDeltaNet for the new tokens of several sequences in one call; only kernels for CPUs need it as one operation."""

from flashmoe_mlx.custom_kernels.gated_delta_net_batch import cpu, reference
from flashmoe_mlx.custom_kernels.operation import Implementation, Operation

__all__ = ["OPERATION"]

OPERATION = Operation(
    name="gated_delta_net_batch",
    reference=reference.gated_delta_net,
    mlx=reference.by_mlx,
    mlx_name=None,
    cpu=Implementation(cpu.gated_delta_net, cpu.code_path, cpu.samples),
    fallback=reference.in_chunks,
)
