"""The kernel that dequantizes experts on GPUs, from their records in place, in one dispatch."""

from collections.abc import Iterator

import mlx.core as mx

from flashmoe_mlx.custom_kernels.checks import CodePath, Sample
from flashmoe_mlx.custom_kernels.dense_experts.reference import Matrices
from flashmoe_mlx.custom_kernels.expert_format import ExpertFormat
from flashmoe_mlx.custom_kernels.kernel import Kernel
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.custom_kernels.weights import format_name

BODY = Kernel(__package__, "body", ["slab", "rows"], ["gate", "up", "down"], ["loads", "stores"])
_THREADS = 256


def code_path(slab: mx.array, rows: mx.array, form: ExpertFormat, dtype: mx.Dtype) -> CodePath | None:  # noqa: ARG001
    """Return the code path of ``dense_experts``; None if it does not support the arguments."""
    supported = form.bits in (2, 3, 4, 8) and dtype in (mx.float32, mx.bfloat16)
    return (format_name(form.bits, form.group_size, form.dtype),) if supported else None


def dense_experts(slab: mx.array, rows: mx.array, form: ExpertFormat, dtype: mx.Dtype) -> Matrices:
    """Compute ``reference.dense_experts`` for arguments with a ``code_path``."""
    size, experts = form.hidden_size * form.intermediate_size, len(rows)
    wide = (experts, form.intermediate_size, form.hidden_size)
    tall = (experts, form.hidden_size, form.intermediate_size)
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


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield two experts of true size."""
    if model.experts is None:
        return
    arguments = (
        RandomInputs(model.dtype, 0).slab(model.experts, 2),
        mx.array([1, 0], mx.int32),
        model.experts,
        model.dtype,
    )
    if code_path(*arguments) is not None:
        yield Sample(arguments)
