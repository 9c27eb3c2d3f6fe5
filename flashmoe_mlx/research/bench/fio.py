"""fio as a candidate of ``io_bench``: the throughput of the disk for a program that does nothing but read.

The format of its report: https://fio.readthedocs.io/en/latest/fio_doc.html#json-output
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.manifest import PackedExperts
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.research.bench.io_bench import Trial
from flashmoe_mlx.stores.contract import StoreStats

LABEL = "fio"
_TIMEOUT = 600


class FioCandidate:
    """Random direct reads of whole records from the layer files by fio, ``depth`` at a time.

    ``registered`` registers fio's buffers and files with the operating system's kernel, as the io_uring store can do.
    Latencies are of single records, not of fetches.

    Raises:
        InputError: the source is not a pack; code "not_a_pack".
    """

    conditions: Sequence[str] = ("cold",)

    def __init__(self, source: ExpertSource, depth: int, registered: bool) -> None:
        if not isinstance(source, PackedExperts):
            raise InputError("fio=true needs a pack, because fio reads whole records", code="not_a_pack")
        if len({layout.record_bytes for layout in source.layout}) > 1:
            raise InputError(
                "fio=true needs records of one size, because fio reads blocks of one size; leave it out for this pack",
                code="contradiction",
            )
        self.label = f"{LABEL} registered=true" if registered else LABEL
        self._source = source
        self._depth = depth
        self._registered = registered

    def check(self) -> None:
        """Check that fio is installed.

        Raises:
            InputError: it is not (code "missing_program").
        """
        if shutil.which("fio") is None:
            raise InputError(
                "fio=true: fio is not installed (apt-get install fio, or brew install fio)", code="missing_program"
            )

    def run(self, condition: str, number: int, requests: RoutingTrace, cached: float) -> Trial:
        """Read as many random records as ``requests`` contains; see ``Candidate.run``."""
        record = self._source.layout.record_bytes
        paths = [self._source.layer_path(layer) for layer in range(self._source.num_layers)]
        count = requests.experts.size
        report = _run_fio(fio_command(paths, record, self._depth, count, number, self._registered))
        return fio_trial(report, self.label, condition, number, cached)


def fio_command(paths: Sequence[Path], record: int, depth: int, count: int, seed: int, registered: bool) -> list[str]:
    """Return the fio command for random direct reads of whole records.

    Args:
        paths: files to read from.
        record: bytes of a record.
        depth: reads in flight.
        count: records to read.
        seed: seed of the random offsets.
        registered: whether to register buffers and files with the operating system's kernel.
    """
    return [
        "fio",
        "--name=records",
        "--filename=" + ":".join(str(path).replace("\\", "\\\\").replace(":", "\\:") for path in paths),
        f"--bs={record}",
        f"--blockalign={record}",
        f"--io_size={record * count}",
        f"--iodepth={depth}",
        f"--randseed={seed + 1}",
        "--rw=randread",
        "--norandommap",
        "--direct=1",
        "--readonly",
        "--ioengine=io_uring",
        *(("--fixedbufs=1", "--registerfiles=1") if registered else ()),
        "--percentile_list=5:50:95",
        "--output-format=json",
    ]


def _run_fio(command: Sequence[str]) -> dict[str, Any]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)  # noqa: S603  # built above, no shell
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FlashMoeError(f"fio: {error}", code="fio_failed") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise FlashMoeError(f"fio failed: {lines[-1]}", code="fio_failed")
    try:
        report = json.loads(done.stdout[done.stdout.index("{") :])  # the report may follow notes
    except ValueError as error:
        raise FlashMoeError(f"fio: the report is not JSON ({error})", code="invalid_fio_report") from error
    assert isinstance(report, dict)
    return report


def fio_trial(report: dict[str, Any], label: str, condition: str, number: int, cached: float) -> Trial:
    """Convert fio's JSON report to a trial whose latencies are the reported percentiles.

    Args:
        report: the parsed report.
        label: label of the candidate.
        condition: condition of the trial.
        number: number of the round.
        cached: share of the requested bytes in the page cache at the start.

    Raises:
        FlashMoeError: a read failed (code "fio_failed"), the report lacks a field ("invalid_fio_report"), or fio read
            too little to measure ("too_little_read").
    """
    try:
        job = report["jobs"][0]
        read = job["read"]
        if job["error"]:
            raise FlashMoeError(f"fio: reading failed with error {job['error']}", code="fio_failed")
        seconds = read["runtime"] / 1e3
        nbytes = read["io_bytes"]
        percentiles = read["clat_ns"]["percentile"]
        latencies = tuple(percentiles[key] / 1e9 for key in ("5.000000", "50.000000", "95.000000"))
        cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
        count = read["total_ios"]
    except (KeyError, IndexError, TypeError) as error:
        raise FlashMoeError(
            f"fio: the report lacks {error}; this version of fio may not be supported", code="invalid_fio_report"
        ) from error
    if not seconds or not nbytes:
        raise FlashMoeError("fio read too little to measure; raise tokens=", code="too_little_read")
    stats = StoreStats(fetches=count, requests=count, misses=count, reads=count, bytes_read=nbytes)
    return Trial(label, condition, number, latencies, seconds, cpu, nbytes, cached, stats)
