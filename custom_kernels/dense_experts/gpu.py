"""The kernel that dequantizes experts on GPUs, from their records in place, in one dispatch."""

from collections.abc import Iterator

import mlx.core as mx

from flashmoe_mlx.custom_kernels.checks import CodePath, Sample
from flashmoe_mlx.custom_kernels.dense_experts.reference import Matrices
from flashmoe_mlx.custom_kernels.expert_format import PROJECTIONS, ExpertFormat
from flashmoe_mlx.custom_kernels.kernel import Kernel
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.shapes import ModelShapes

BODY = Kernel(__package__, "body", ["slab", "rows"], ["gate", "up", "down"], ["loads", "stores"])
_THREADS = 256


def code_path(slab: mx.array, rows: mx.array, form: ExpertFormat, dtype: mx.Dtype) -> CodePath | None:  # noqa: ARG001
    """Return the code path of ``dense_experts``; None if it does not support the arguments."""
    supported = all(own.bits in (2, 3, 4, 8) for own in form.formats) and dtype in (mx.float32, mx.bfloat16)
    return (form.name,) if supported else None


def dense_experts(slab: mx.array, rows: mx.array, form: ExpertFormat, dtype: mx.Dtype) -> Matrices:
    """Compute ``reference.dense_experts`` for arguments with a ``code_path``."""
    size, experts = form.hidden_size * form.intermediate_size, len(rows)
    wide = (experts, form.intermediate_size, form.hidden_size)
    tall = (experts, form.hidden_size, form.intermediate_size)
    template: dict[str, int | mx.Dtype] = {
        "T": dtype,
        "SIZE": size,
        "RECORD_BYTES": slab.shape[1],
        "THREADS": _THREADS,
    }
    for projection in PROJECTIONS:
        template |= form.template_of(projection)
    gate, up, down = BODY(
        [slab, rows],
        [(wide, dtype), (wide, dtype), (tall, dtype)],
        (-(-size // 8 // _THREADS), experts, 3),
        _THREADS,
        template,
    )
    return gate, up, down


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield two experts of true size of each format."""
    for form in model.experts:
        rows = mx.array([1, 0], mx.int32)
        if code_path(rows, rows, form, model.dtype) is not None:
            yield Sample((RandomInputs(model.dtype, 0).slab(form, 2), rows, form, model.dtype))
