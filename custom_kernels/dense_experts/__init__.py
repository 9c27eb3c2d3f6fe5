"""The matrices of some experts, dequantised from their records in place, in one dispatch."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.dense_experts import reference
from flashmoe_mlx.custom_kernels.expert_mlp.reference import format_name
from flashmoe_mlx.custom_kernels.kernel import Kernel
from flashmoe_mlx.custom_kernels.routed_experts.format import ExpertFormat

__all__ = ["code_path", "dense_experts", "fits", "reference"]

BODY = Kernel("dense_experts", "body", ["slab", "rows"], ["gate", "up", "down"], ["loads", "stores"])
_THREADS = 256


def fits(form: ExpertFormat, dtype: mx.Dtype) -> bool:
    """Whether the kernel makes matrices of ``dtype`` out of experts of this form."""
    return form.bits in (2, 3, 4, 8) and dtype in (mx.float32, mx.bfloat16)


def code_path(slab: mx.array, rows: mx.array, form: ExpertFormat, dtype: mx.Dtype) -> tuple[str, ...] | None:  # noqa: ARG001
    """Name the code path of ``dense_experts``; None if it does not take the arguments."""
    return (format_name(form.bits, form.group_size, form.dtype),) if fits(form, dtype) else None


def dense_experts(
    slab: mx.array, rows: mx.array, form: ExpertFormat, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """As ``reference.dense_experts``, if experts and ``dtype`` fit."""
    size, experts = form.hidden_size * form.intermediate_size, len(rows)
    wide, tall = (
        (experts, form.intermediate_size, form.hidden_size),
        (experts, form.hidden_size, form.intermediate_size),
    )
    template: dict[str, int | mx.Dtype] = {
        "T": dtype,
        "S": form.dtype,
        "BITS": form.bits,
        "GROUP": form.group_size,
        "SIZE": size,
        "RECORD_BYTES": form.record_bytes,
        "THREADS": _THREADS,
    }
    gate, up, down = BODY(
        [slab, rows],
        [(wide, dtype), (wide, dtype), (tall, dtype)],
        (-(-size // 8 // _THREADS), experts, 3),
        _THREADS,
        template | {name.replace(".", "_").upper(): offset for name, offset in form.offsets.items()},
    )
    return gate, up, down
