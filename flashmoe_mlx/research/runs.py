"""Load the records of ``task=generate`` (single runs and sweeps) and ``task=bench`` into one table."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe_mlx.errors import InputError, missing_extra
from flashmoe_mlx.paths import expand_path

if TYPE_CHECKING:
    from pandas import DataFrame

_Reader = Callable[[Mapping[str, Any]], Iterator[dict[str, Any]]]
_STAGE = (
    "tokens",
    "seconds",
    "tokens_per_second",
    "bytes_read",
    "bytes_per_token",
    "bytes_wasted",
    "experts_requested",
    "hits",
    "hit_rate",
    "page_cache_hit_rate",
    "io_hidden",
    "prefetched",
    "reads",
    "read_gb_per_second",
    "weights_gb_per_second",
)


def load_runs(folder: str | Path) -> "DataFrame":
    """Load every recorded run below ``folder``, one row for each generation and for each trial of a benchmark.

    Rows are in the order of the directories' names. Columns that describe the run:

    - ``run`` (its directory, relative to ``folder``), ``task``, ``model``
    - ``backend`` (a name), ``backend.OPTION`` for every option, ``setting`` (label of the configuration in a benchmark)
    - ``experts_k``, ``bits``, ``prefetch``, ``kernels``
    - ``condition`` ("as found" for a generation), ``round``

    Columns with measurements:

    - ``decode_*`` and ``prefill_*``: seconds, bytes, GB/s, p5, p50 and p95 of a step, and the share of the time in each
      phase, such as ``decode_io_share``
    - ``time_to_first_token``, ``accuracy`` of prefetch, ``text``

    The row of a failed job has only ``run`` and ``error``.

    Raises:
        InputError: pandas is not installed (code "missing_extra"), the folder does not exist ("no_such_folder"), or a
            record cannot be read ("invalid_record").
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise missing_extra("load_runs", "research") from error
    top = expand_path(folder)
    if not top.is_dir():
        raise InputError(f"{top}: no such folder", code="no_such_folder")
    rows = []
    for path in sorted(top.rglob("*.json"), key=_natural_order):
        read = _READERS.get(path.name)
        if read is not None:
            run = {"run": str(path.parent.relative_to(top))}
            rows += [run | row for row in _rows(path, read)]
    return pd.DataFrame(rows)


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Return a sort key by which numbered directories, such as the jobs of a sweep, are in numeric order."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.parts]


def _rows(path: Path, read: _Reader) -> list[dict[str, Any]]:
    """Return the rows of the record in ``path``.

    Raises:
        InputError: the record cannot be read (code "invalid_record").
    """
    try:
        return list(read(json.loads(path.read_text())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: the record cannot be read ({type(error).__name__}: {error})", code="invalid_record"
        ) from None


def _generation(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the row of ``metrics.json``."""
    row = {"task": "generate", "model": record["model"]["path"], "condition": record["page_cache"]}
    yield {**row, **_measured(record), "text": record["text"]}


def _bench(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each trial of ``bench.json``."""
    for trial in record["passes"]:
        row = {
            "task": "bench",
            "model": record["setup"]["folder"],
            "memory_gib": record["setup"]["memory_gib"],
            **{name: trial[name] for name in ("setting", "condition", "round", "prompt", "cached")},
        }
        yield row | _measured(trial["record"])


def _failure(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the row of ``failure.json``."""
    yield {"error": record["error"]}


def _measured(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a run from the values of ``Engine.setup`` and ``Engine.stats``."""
    backend = dict(record["backend"])
    kernels = record["kernels"]
    row: dict[str, Any] = {
        "backend": backend.pop("_target_").rpartition(".")[0].rpartition(".")[2],
        "experts_k": record["experts_k"],
        "bits": record["experts"]["bits"],
        "prefetch": record.get("prefetch", "none"),  # absent from older records
        "kernels": kernels if isinstance(kernels, str) else json.dumps(kernels),
        "time_to_first_token": record["time_to_first_token"],
        "accuracy": (record.get("guesses") or {}).get("accuracy"),
        "peak_bytes": record["process_peak_bytes"],
    }
    row |= {f"backend.{option}": value for option, value in backend.items()}
    for stage in ("prefill", "decode"):
        measured = record[stage]
        row |= {f"{stage}_{name}": measured.get(name) for name in _STAGE}
        row |= {f"{stage}_{name}_seconds": value for name, value in (measured["step_seconds"] or {}).items()}
        for phase, seconds in measured["phase_seconds"].items():
            row[f"{stage}_{phase}_share"] = seconds / measured["seconds"] if measured["seconds"] else None
    return row


_READERS: Mapping[str, _Reader] = {"metrics.json": _generation, "bench.json": _bench, "failure.json": _failure}
