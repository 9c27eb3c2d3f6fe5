"""The kernel that gathers rows on GPUs, 16 bytes per thread."""

from collections.abc import Iterator

import mlx.core as mx

from flashmoe_mlx.custom_kernels.checks import CodePath, Sample
from flashmoe_mlx.custom_kernels.kernel import Kernel
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.shapes import ModelShapes

BODY = Kernel(__package__, "body", ["x", "indices"], ["y"])
_THREADS = 256
_WORD = 16


def code_path(x: mx.array, indices: mx.array) -> CodePath | None:
    """Return the code path of ``gather_rows``; None if it does not support the arguments."""
    return () if x.shape[1] * x.dtype.size % _WORD == 0 and indices.dtype == mx.int32 else None


def gather_rows(x: mx.array, indices: mx.array) -> mx.array:
    """Compute ``reference.gather_rows`` for arguments with a ``code_path``."""
    words = x.shape[1] * x.dtype.size // _WORD
    (y,) = BODY(
        [x, indices],
        [((len(indices), x.shape[1]), x.dtype)],
        (-(-len(indices) * words // _THREADS), 1, 1),
        _THREADS,
        {"WORDS": words, "THREADS": _THREADS},
    )
    return y


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield some rows of the model's width."""
    x = RandomInputs(model.dtype, 0).normal(5, model.hidden_size)
    indices = mx.array([4, 0, 0, 2, 1, 3, 4], mx.int32)
    if code_path(x, indices) is not None:
        yield Sample((x, indices))
