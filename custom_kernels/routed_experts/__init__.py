"""The routed experts of some tokens, and the shared expert, from their records in place."""

from flashmoe_mlx.custom_kernels.operation import Implementation, Operation
from flashmoe_mlx.custom_kernels.routed_experts import cpu, gpu, mlx, reference

__all__ = ["OPERATION"]

OPERATION = Operation(
    name="routed_experts",
    reference=reference.routed_experts,
    mlx=mlx.routed_experts,
    mlx_name="expert_mlp",
    gpu=Implementation(gpu.routed_experts, gpu.code_path, gpu.samples),
    cpu=Implementation(cpu.routed_experts, cpu.code_path, cpu.samples, adapt=cpu.on_records, rounds=True),
    prompts={
        "reference": "reference",
        "mlx": "expert_mlp",
        "metal": "expert_mlp",
        "cuda": "dense_experts",
        "fallback": "expert_mlp",
    },
)
