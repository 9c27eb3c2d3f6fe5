"""The kernel that adds weighted rows on GPUs, one value per thread."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.checks import CodePath, Sample
from flashmoe_mlx.custom_kernels.kernel import Kernel
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.shapes import ModelShapes

BODY = Kernel(__package__, "body", ["y", "rows", "places", "weights"], ["sums"])
_THREADS = 256


def code_path(y: mx.array, rows: mx.array, places: mx.array, weights: mx.array) -> CodePath | None:
    """Return the code path of ``add_rows``; None if it does not support the arguments."""
    supported = rows.dtype in (mx.float32, mx.bfloat16) and y.dtype == weights.dtype == mx.float32
    return (f"K={places.shape[1]}",) if supported and places.dtype == mx.int32 else None


def add_rows(y: mx.array, rows: mx.array, places: mx.array, weights: mx.array) -> mx.array:
    """Compute ``reference.add_rows`` for arguments with a ``code_path``."""
    (sums,) = BODY(
        [y, rows, places, weights],
        [(y.shape, mx.float32)],
        (-(-y.size // _THREADS), 1, 1),
        _THREADS,
        {"WIDTH": y.shape[1], "CHOICES": places.shape[1], "THREADS": _THREADS},
    )
    return sums


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield some tokens of the model's width, of which some choices have no row."""
    inputs, k = RandomInputs(model.dtype, 0), model.experts_k
    places = np.random.default_rng(0).integers(-1, 7, (5, k)).astype(np.int32)
    y, weights = inputs.normal(5, model.hidden_size, dtype=mx.float32), inputs.normal(5, k, dtype=mx.float32)
    arguments = (y, inputs.normal(7, model.hidden_size), mx.array(places), weights)
    if code_path(*arguments) is not None:
        yield Sample(arguments)
