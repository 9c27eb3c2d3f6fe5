"""fio as a contender: the throughput of the disk for a program that only reads.

https://fio.readthedocs.io/en/latest/fio_doc.html#json-output
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
from flashmoe_mlx.research.bench.io_bench import Pass
from flashmoe_mlx.stores.contract import StoreStats

LABEL = "fio"
_TIMEOUT = 600


class FioContender:
    """Reads whole records at random from the layer files, past the page cache, ``depth`` at a time.

    ``registered`` pins fio's buffers and files with the kernel, as the io_uring store can. Its latencies are those of
    single records, not of fetches.

    Raises:
        InputError: the source is not a pack; code "not_a_pack".
    """

    conditions: Sequence[str] = ("cold",)

    def __init__(self, source: ExpertSource, depth: int, registered: bool) -> None:
        if not isinstance(source, PackedExperts):
            raise InputError("fio=true needs a pack, whose records lie in one piece", code="not_a_pack")
        self.label = f"{LABEL} registered=true" if registered else LABEL
        self._source = source
        self._depth = depth
        self._registered = registered

    def check(self) -> None:
        """Raise InputError, code "missing_program", unless fio is installed."""
        if shutil.which("fio") is None:
            raise InputError(
                "fio=true: fio is not installed (apt-get install fio, or brew install fio)", code="missing_program"
            )

    def run(self, condition: str, number: int, requests: RoutingTrace, cached: float) -> Pass:
        """Read as many random records as ``requests`` contains."""
        record = self._source.layout.record_bytes
        paths = [self._source.layer_path(layer) for layer in range(self._source.num_layers)]
        count = requests.experts.size
        report = _run_fio(fio_command(paths, record, self._depth, count, number, self._registered))
        return fio_pass(report, self.label, condition, number, cached)


def fio_command(paths: Sequence[Path], record: int, depth: int, count: int, seed: int, registered: bool) -> list[str]:
    """Return the command that reads ``count`` records of ``record`` bytes."""
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
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)  # noqa: S603  # made here, no shell
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FlashMoeError(f"fio: {error}", code="fio_failed") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise FlashMoeError(f"fio failed: {lines[-1]}", code="fio_failed")
    try:
        report = json.loads(done.stdout[done.stdout.index("{") :])  # notes may come first
    except ValueError as error:
        raise FlashMoeError(f"fio: its report is not JSON ({error})", code="invalid_fio_report") from error
    assert isinstance(report, dict)
    return report


def fio_pass(report: dict[str, Any], label: str, condition: str, number: int, cached: float) -> Pass:
    """Convert fio's JSON report to a pass, in which its percentiles stand for all latencies.

    Raises:
        FlashMoeError: reading failed (code "fio_failed"), the report lacks a field ("invalid_fio_report"), or fio read
            too little ("too_little_read").
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
        raise FlashMoeError(f"fio: its report lacks {error}; another version?", code="invalid_fio_report") from error
    if not seconds or not nbytes:
        raise FlashMoeError("fio read nothing, or too little to time; choose more tokens", code="too_little_read")
    stats = StoreStats(fetches=count, requests=count, misses=count, reads=count, bytes_read=nbytes)
    return Pass(label, condition, number, latencies, seconds, cpu, nbytes, cached, stats)
