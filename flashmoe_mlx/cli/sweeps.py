"""Summary of a sweep: a table of the measurements of its jobs, and a line for each failed job."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe_mlx.console.streams import one_line, say

if TYPE_CHECKING:
    from rich.table import Table

_METRICS = "metrics.json"


@dataclass
class Job:
    """Run of a task, alone or in a sweep; ``failure`` is the message of the error that ended it."""

    folder: Path
    overrides: list[str]
    failure: str | None = None


def summarize(jobs: Sequence[Job]) -> None:
    """Print the measurements and the failures of a sweep; print nothing after a single job."""
    if len(jobs) < 2:
        return
    common = set.intersection(*(set(job.overrides) for job in jobs))
    labels = [" ".join([job.folder.name, *(part for part in job.overrides if part not in common)]) for job in jobs]
    measured = [(label, record) for label, job in zip(labels, jobs, strict=True) if (record := _metrics(job))]
    if len(measured) > 1:
        from flashmoe_mlx.console.output import print_table, show  # rich is slow to import, and --help needs none

        show()
        print_table(_table(measured))
    for line in _failures(labels, jobs):
        say(line)


def _metrics(job: Job) -> dict[str, Any] | None:
    """Return the measurements of a job that answered a prompt; None for any other job."""
    try:
        record = json.loads((job.folder / _METRICS).read_text()) if job.failure is None else None
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "decode" in record else None


def _table(measured: Sequence[tuple[str, dict[str, Any]]]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("job", no_wrap=True)
    for heading in ("decode tok/s", "ms p50", "MB/token", "hits", "first token s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, record in measured:
        decode = record["decode"]
        table.add_row(
            label,
            _shown(decode["tokens_per_second"], ".2f"),
            _shown((decode["step_seconds"] or {}).get("p50"), ".3g", 1e3),
            _shown(decode["bytes_per_token"], ".3g", 1e-6),
            _shown(decode["hit_rate"], ".0%"),
            _shown(record["time_to_first_token"], ".3g"),
        )
    return table


def _shown(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def _failures(labels: Sequence[str], jobs: Sequence[Job]) -> Iterator[str]:
    failed = [(label, job.failure) for label, job in zip(labels, jobs, strict=True) if job.failure is not None]
    if failed:
        yield f"flashmoe_mlx: {len(failed)} of {len(jobs)} jobs failed; the records of all other jobs are complete:"
        for label, failure in failed:
            yield one_line(f"  {label}: {failure}")
