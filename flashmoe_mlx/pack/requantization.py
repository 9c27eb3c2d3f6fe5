"""Relative errors of weights that were decoded from a checkpoint and quantized again."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.formats.arrays import array_from
from flashmoe_mlx.formats.components import dense_projection, record_views
from flashmoe_mlx.formats.files import write_atomically
from flashmoe_mlx.formats.record import RecordLayout

Errors = Mapping[str, Iterable[float]]
"""The relative errors of matrices, by the name of their projection."""


def relative_error(made: mx.array, exact: npt.NDArray[np.float32]) -> float:
    """Return the norm of the difference of ``made`` from ``exact``, divided by the norm of ``exact``."""
    norm = float(np.linalg.norm(exact))
    difference = np.array(made.astype(mx.float32)) - exact
    return float(np.linalg.norm(difference)) / norm if norm else float(np.linalg.norm(difference))


def record_errors(
    record: memoryview, layout: RecordLayout, exact: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, float]:
    """Return the relative error of each projection in ``exact``, which maps projections to weights [out, in]."""
    components = record_views(array_from(record, "U8", (len(record),)), layout)
    return {name: relative_error(dense_projection(components, name, layout), own) for name, own in exact.items()}


def write_errors(path: Path, errors: Errors) -> None:
    """Keep the errors of a unit of work in ``path``; without errors there is no file."""
    if errors:
        write_atomically(path, json.dumps({name: list(own) for name, own in errors.items()}).encode())


def summarize_errors(paths: Iterable[Path]) -> dict[str, Any]:
    """Return the mean and the worst error of each projection over the files that ``write_errors`` wrote."""
    found: dict[str, list[float]] = defaultdict(list)
    for path in paths:
        if path.exists():
            for name, own in json.loads(path.read_text()).items():
                found[name] += own
    return {name: {"mean": sum(own) / len(own), "worst": max(own)} for name, own in found.items()}


def describe_errors(summary: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    """Yield a line for each variant, and for the resident weights, of ``requantization_error`` in a manifest."""
    for name, projections in summary.items():
        listed = (f"{own} {error['mean']:.2%} (worst {error['worst']:.2%})" for own, error in projections.items())
        yield f"relative error of {'resident weights' if name == 'resident' else name}: {', '.join(listed)}"
