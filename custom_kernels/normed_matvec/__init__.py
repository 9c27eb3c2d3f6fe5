"""RMS norm, then a quantized matrix; only kernels for GPUs need both as one operation."""

from flashmoe_mlx.custom_kernels.normed_matvec import gpu, reference
from flashmoe_mlx.custom_kernels.operation import Implementation, Operation

__all__ = ["OPERATION"]

OPERATION = Operation(
    name="normed_matvec",
    reference=reference.normed_matvec,
    mlx=reference.by_mlx,
    mlx_name=None,
    gpu=Implementation(gpu.normed_matvec, gpu.code_path, gpu.samples),
)
