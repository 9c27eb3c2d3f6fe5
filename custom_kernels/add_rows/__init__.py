"""Weighted sums of rows: the outputs of experts, added for each token; only prompts on CUDA use the kernel."""

from flashmoe_mlx.custom_kernels.add_rows import gpu, reference
from flashmoe_mlx.custom_kernels.operation import Implementation, Operation

__all__ = ["OPERATION"]

OPERATION = Operation(
    name="add_rows",
    reference=reference.add_rows,
    mlx=reference.by_mlx,
    mlx_name=None,
    gpu=Implementation(gpu.add_rows, gpu.code_path, gpu.samples, dialects=("cuda",)),
)
