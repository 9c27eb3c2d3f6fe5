"""The kernel of the embedding for GPUs, in one dispatch."""

from collections.abc import Iterator

import mlx.core as mx

from flashmoe_mlx.custom_kernels.checks import CodePath, Sample
from flashmoe_mlx.custom_kernels.kernel import Kernel
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.custom_kernels.weights import QuantizedWeight, format_name

BODY = Kernel(__package__, "body", ["weight", "scales", "biases", "indices"], ["y"])
_THREADS = 256
_SAMPLE_ROWS = 64


def code_path(table: QuantizedWeight, indices: mx.array, dtype: mx.Dtype) -> CodePath | None:
    """Return the code path of ``embedding``; None if it does not support the arguments."""
    if table.bits is None or table.scales is None or table.group_size is None:
        return None
    supported = dtype in (mx.float32, mx.bfloat16) and indices.dtype in (mx.uint32, mx.int32)
    form = format_name(table.bits, table.group_size, table.scales.dtype)
    return (form, "" if indices.dtype == mx.uint32 else "signed indices") if supported else None


def embedding(table: QuantizedWeight, indices: mx.array, dtype: mx.Dtype) -> mx.array:
    """Compute ``reference.embedding`` for arguments with a ``code_path``."""
    assert table.bits is not None
    assert table.scales is not None
    assert table.biases is not None
    assert table.group_size is not None
    tokens, columns = len(indices), table.columns
    template: dict[str, int | mx.Dtype] = {
        "T": dtype,
        "COLUMNS": columns,
        "BITS": table.bits,
        "GROUP": table.group_size,
        "THREADS": _THREADS,
    }
    (y,) = BODY(
        [table.weight, table.scales, table.biases, indices],
        [((tokens, columns), dtype)],
        (-(-tokens * columns // _THREADS), 1, 1),
        _THREADS,
        template,
    )
    return y


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield some rows of a table in the format of the model's, with fewer rows."""
    table = model.embedding
    if table is None or code_path(table, mx.array([0], mx.uint32), model.dtype) is None:
        return
    drawn = RandomInputs(model.dtype, 0).like(table, _SAMPLE_ROWS)
    yield Sample((drawn, mx.array([5, 0, _SAMPLE_ROWS - 1], mx.uint32), model.dtype))
