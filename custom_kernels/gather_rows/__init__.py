"""Rows of a matrix by index; only prompts on CUDA use the kernel, because MLX compiles a module there for seconds."""

from flashmoe_mlx.custom_kernels.gather_rows import gpu, reference
from flashmoe_mlx.custom_kernels.operation import Implementation, Operation

__all__ = ["OPERATION"]

OPERATION = Operation(
    name="gather_rows",
    reference=reference.gather_rows,
    mlx=reference.by_mlx,
    mlx_name=None,
    gpu=Implementation(gpu.gather_rows, gpu.code_path, gpu.samples, dialects=("cuda",)),
)
