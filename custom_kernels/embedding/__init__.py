"""Rows of a quantized embedding table; the kernel takes one dispatch where MLX takes four."""

from flashmoe_mlx.custom_kernels.embedding import gpu, reference
from flashmoe_mlx.custom_kernels.operation import Implementation, Operation

__all__ = ["OPERATION"]

OPERATION = Operation(
    name="embedding",
    reference=reference.embedding,
    mlx=reference.by_mlx,
    mlx_name=None,
    gpu=Implementation(gpu.embedding, gpu.code_path, gpu.samples, dialects=("cuda",)),  # not measured on a Mac
)
