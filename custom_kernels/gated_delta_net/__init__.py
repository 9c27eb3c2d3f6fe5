"""The part of a GatedDeltaNet layer between its projections."""

from flashmoe_mlx.custom_kernels.gated_delta_net import cpu, gpu, mlx, reference
from flashmoe_mlx.custom_kernels.operation import Implementation, Operation

__all__ = ["OPERATION"]

_FUSED = "mx.fast.gated_delta_update"

OPERATION = Operation(
    name="gated_delta_net",
    reference=reference.gated_delta_net,
    mlx=mlx.gated_delta_net,
    mlx_name=_FUSED,
    gpu=Implementation(gpu.gated_delta_net, gpu.code_path, gpu.samples),
    cpu=Implementation(cpu.gated_delta_net, cpu.code_path, cpu.samples),
    fallback=mlx.in_chunks,
    prompts={"reference": "reference", "mlx": _FUSED, "metal": _FUSED, "fallback": "chunks by numpy"},
)
