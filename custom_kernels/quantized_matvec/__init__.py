"""A quantized matrix times a few vectors: decoding with resident weights."""

from flashmoe_mlx.custom_kernels.operation import Implementation, Operation
from flashmoe_mlx.custom_kernels.quantized_matvec import cpu, gpu, mlx, reference
from flashmoe_mlx.custom_kernels.quantized_matvec.products import one_by_one

__all__ = ["OPERATION"]

OPERATION = Operation(
    name="quantized_matvec",
    reference=reference.quantized_matvec,
    mlx=mlx.quantized_matvec,
    mlx_name="mx.quantized_matmul",
    gpu=Implementation(gpu.quantized_matvec, gpu.code_path, gpu.samples),
    cpu=Implementation(cpu.products, cpu.code_path, cpu.samples, adapt=one_by_one, rounds=True),
)
