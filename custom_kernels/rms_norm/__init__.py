"""RMS norm: x / rms(x) * weight.

MLX's operation is the reference too: it is one of the elementary operations that references consist of.
"""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.operation import Implementation, Operation
from flashmoe_mlx.custom_kernels.rms_norm import cpu

__all__ = ["OPERATION"]

OPERATION = Operation(
    name="rms_norm",
    reference=mx.fast.rms_norm,
    mlx=mx.fast.rms_norm,
    mlx_name="mx.fast.rms_norm",
    cpu=Implementation(cpu.rms_norm, cpu.code_path, cpu.samples),
)
