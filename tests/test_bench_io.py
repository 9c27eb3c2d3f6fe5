"""task=bench_io: replayed requests and their order, summaries, fio, and refused arguments."""

import json
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_oracle import assert_one_line

from flashmoe_mlx.backends.pread import PreadStore
from flashmoe_mlx.cli.application import run as run_command_line
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.research.bench import io_bench
from flashmoe_mlx.research.bench.fio import FioCandidate, fio_command, fio_trial
from flashmoe_mlx.research.bench.io_bench import StoreCandidate, Trial, repeats, replay
from flashmoe_mlx.research.bench.io_summary import compare_fastest, summarize
from flashmoe_mlx.research.intervals import median_interval
from flashmoe_mlx.research.traces.random_traces import uniform_trace
from flashmoe_mlx.stores.contract import StoreStats

LAYERS, EXPERTS = 4, 16


@pytest.fixture
def source(tiny_pack: Path) -> ExpertSource:
    return open_model(tiny_pack).variant(None)


def make_trial(contender: str, number: int, seconds: float, condition: str = "cold", **changes: Any) -> Trial:
    stats = StoreStats(fetches=2, requests=8, misses=8, reads=8, bytes_read=10**9)
    made = Trial(contender, condition, number, (seconds / 2, seconds / 2), seconds, 0.5, 10**9, 0.0, stats)
    return replace(made, **changes)


class Recorder:
    """A candidate that records its calls."""

    conditions = ("cold", "warm")

    def __init__(self, label: str, ran: list[tuple[int, str, str]]) -> None:
        self.label, self._ran = label, ran

    def check(self) -> None:
        self._ran.append((-1, "check", self.label))

    def run(self, condition: str, number: int, requests: RoutingTrace, cached: float) -> Trial:
        self._ran.append((number, condition, self.label))
        return make_trial(self.label, number, 1.0, condition, cached=cached)


def test_the_order_is_reversed_in_every_second_round(source: ExpertSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_bench, "evict", lambda _: None)
    ran: list[tuple[int, str, str]] = []
    requests = [uniform_trace(1, LAYERS, EXPERTS, 2, seed) for seed in range(3)]
    list(replay(source, [Recorder(name, ran) for name in "AB"], requests, ["cold", "warm"], str))
    assert "".join(label for _, _, label in ran[:2]) == "AB"
    assert [(number, condition) for number, condition, _ in ran[2::2]] == [
        (number, condition) for number in range(3) for condition in ("cold", "warm")
    ]
    assert "".join(label for _, _, label in ran[2:]) == "ABAB" + "BABA" + "ABAB"


def test_every_request_is_replayed(source: ExpertSource) -> None:
    requests = uniform_trace(5, LAYERS, EXPERTS, 3, seed=1)
    (trial,) = replay(source, [StoreCandidate("p", lambda: PreadStore(source))], [requests], ["warm"], str)
    assert len(trial.latencies) == 5 * LAYERS
    assert trial.seconds == pytest.approx(sum(trial.latencies))
    assert (trial.stats.fetches, trial.stats.requests) == (5 * LAYERS, 5 * LAYERS * 3)
    assert trial.nbytes == trial.stats.bytes_read == 5 * LAYERS * 3 * source.layout.record_bytes
    assert trial.cached == 1.0
    assert trial.cpu_seconds >= 0


def test_requests_larger_than_a_store_are_split(source: ExpertSource) -> None:
    requests = uniform_trace(2, LAYERS, EXPERTS, 5, seed=1)
    (trial,) = replay(source, [StoreCandidate("p", lambda: PreadStore(source, slots=2))], [requests], ["warm"], str)
    assert len(trial.latencies) == 2 * LAYERS
    assert (trial.stats.fetches, trial.stats.requests) == (2 * LAYERS * 3, 2 * LAYERS * 5)


def test_rates_and_percentiles() -> None:
    trials = [make_trial("a", n, s) for n, s in enumerate((1.0, 2.0, 4.0))] + [
        make_trial("b", n, 0.5) for n in range(3)
    ]
    trials[1] = replace(trials[1], latencies=(0.5, 1.5))
    first, second = summarize(trials)
    assert (first.contender, first.gb_per_second, first.ratio, first.ratio_interval) == ("a", 0.5, 1.0, (1.0, 1.0))
    assert second.gb_per_second == 2.0
    assert second.ratio == pytest.approx(4.0)  # 2, 4, 8
    assert second.interval == (2.0, 2.0)
    assert first.read_gb_per_second == pytest.approx(3 / 7)
    assert first.iops == pytest.approx(24 / 7)
    assert first.latency_ms == pytest.approx(1e3 * np.percentile([0.5, 0.5, 0.5, 1.5, 2, 2], (5, 50, 95)))
    assert first.cpu_seconds_per_gb == pytest.approx(0.5)
    assert first.hit_rate == 0.0


def test_conditions_are_kept_apart() -> None:
    trials = [
        make_trial("a", 0, 1.0),
        make_trial("a", 0, 0.5, "warm"),
        make_trial("b", 0, 2.0),
        make_trial("b", 0, 0.25, "warm"),
    ]
    found = {
        (summary.condition, summary.contender): (summary.gb_per_second, summary.ratio) for summary in summarize(trials)
    }
    assert found == {("cold", "a"): (1, 1), ("cold", "b"): (0.5, 0.5), ("warm", "a"): (2, 1), ("warm", "b"): (4, 2)}


def test_intervals() -> None:
    assert median_interval([1.0, 2.0]) is None
    assert median_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)
    values = np.random.default_rng(1).normal(10, 1, 200).tolist()
    interval = median_interval(values)
    assert interval is not None
    low, high = interval
    assert low < np.median(values) < high
    assert 0.2 < high - low < 0.6  # about 4 x 1.25 / sqrt(200)
    assert median_interval(values) == interval


def test_the_fastest_store_is_compared_with_fio() -> None:
    hit = StoreStats(requests=8, hits=8)
    trials = [make_trial("fio", n, 1.0 + n) for n in range(3)] + [
        make_trial("fio registered=true", n, 10.0) for n in range(3)
    ]
    trials += [make_trial("slow", n, 9.0) for n in range(3)] + [make_trial("quick", n, 2.0 + 2 * n) for n in range(3)]
    trials += [make_trial("resident", n, 0.001, stats=hit) for n in range(3)]
    assert compare_fastest(trials, lambda label: label.startswith("fio")) == ("quick", "fio", [0.5, 0.5, 0.5])
    assert compare_fastest(trials[6:], lambda label: label.startswith("fio")) is None


def test_repeated_requests() -> None:
    choices = np.array([[[0, 1]], [[1, 2]], [[3, 0]]], np.uint16)
    assert repeats(RoutingTrace(choices, 8, 0, "", "")) == pytest.approx(2 / 6)


# fio

REPORT = {
    "fio version": "fio-3.33",
    "jobs": [
        {
            "error": 0,
            "job_runtime": 2000,
            "usr_cpu": 1.5,
            "sys_cpu": 8.5,
            "read": {
                "io_bytes": 3_000_000_000,
                "runtime": 1500,
                "total_ios": 424,
                "clat_ns": {"percentile": {"5.000000": 1_000_000, "50.000000": 2_000_000, "95.000000": 3_000_000}},
            },
        }
    ],
}


def test_a_report_of_fio_becomes_a_trial() -> None:
    trial = fio_trial(REPORT, "fio", "cold", 2, 0.0)
    assert (trial.contender, trial.condition, trial.round, trial.nbytes) == ("fio", "cold", 2, 3_000_000_000)
    assert trial.rate == 2e9
    assert trial.latencies == (0.001, 0.002, 0.003)
    assert trial.cpu_seconds == pytest.approx(0.2)
    assert trial.stats.reads == 424


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"error": 5}, "fio_failed"),
        ({"read": {}}, "invalid_fio_report"),
        ({"read": REPORT["jobs"][0]["read"] | {"runtime": 0}}, "too_little_read"),  # type: ignore[index]
    ],
)
def test_incomplete_reports_of_fio_are_refused(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(FlashMoeError) as caught:
        fio_trial({"jobs": [REPORT["jobs"][0] | changes]}, "fio", "cold", 0, 0.0)  # type: ignore[index]
    assert caught.value.code == code
    assert_one_line(caught.value)


def test_the_command_reads_whole_records_and_never_writes() -> None:
    command = fio_command([Path("/a:b/c"), Path("/d")], 32768, depth=10, count=7, seed=0, registered=True)
    assert {"--bs=32768", "--blockalign=32768", "--io_size=229376", "--iodepth=10", "--direct=1", "--readonly"} < set(
        command
    )
    assert "--filename=/a\\:b/c:/d" in command
    assert "--fixedbufs=1" in command
    assert "--fixedbufs=1" not in fio_command([Path("/d")], 32768, 10, 7, 0, registered=False)


def fake_fio(folder: Path, script: str) -> None:
    path = folder / "fio"
    path.write_text(f"#!{sys.executable}\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [
        (
            "import sys; print('note', file=sys.stderr); sys.exit('fio: no engine')",
            "fio_failed",
            "fio: no engine",  # the last line of fio's output is part of the message
        ),
        ("print('no json {')", "invalid_fio_report", ""),
        ("pass", "invalid_fio_report", ""),
    ],
)
def test_failures_of_fio(
    script: str, code: str, reason: str, source: ExpertSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_fio(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    candidate = FioCandidate(source, 2, registered=False)
    candidate.check()
    with pytest.raises(FlashMoeError) as caught:
        candidate.run("cold", 0, uniform_trace(1, LAYERS, EXPERTS, 2, 0), 0.0)
    assert caught.value.code == code
    assert reason in str(caught.value)
    assert_one_line(caught.value)


def test_missing_fio(source: ExpertSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError) as caught:
        FioCandidate(source, 2, registered=False).check()
    assert caught.value.code == "missing_program"


# The command line


def bench(pack: Path, out: Path, *arguments: str) -> int:
    return run_command_line(["task=bench_io", f"model.path={pack}", f"hydra.run.dir={out}", "tokens=2", *arguments])


def test_a_whole_run(tiny_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    (tmp_path / "bin").mkdir()
    fake_fio(tmp_path / "bin", f"print({json.dumps(json.dumps(REPORT))})")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(io_bench, "evict", lambda _: None)  # the folder of the tests may be on a file system in memory
    backends = "backends=[pread,{name:pread,threads:2,direct:false},{name:ram_hybrid,budget_gib:0.01},resident]"
    assert bench(tiny_pack, tmp_path / "out", backends, "rounds=3", "requests=zipf", "experts_k=3", "fio=true") == 0
    record = json.loads((tmp_path / "out" / "bench_io.json").read_text())
    labels = ["pread", "pread threads=2 direct=false", "ram_hybrid budget_gib=0.01", "resident"]
    assert [trial["contender"] for trial in record["passes"][:6]] == [*labels, "fio", "fio registered=true"]
    assert len(record["passes"]) == 3 * (6 + 4)
    assert record["experts_k"] == 3
    assert {summary["hit_rate"] for summary in record["summary"] if summary["contender"] == "resident"} == {1.0}
    assert record["environment"]["command"]
    shown = capsys.readouterr().err
    for label in labels:
        assert label in shown
    assert "cold, pread" in shown
    assert " / fio: " in shown
    assert "MB stay" not in shown


def test_the_backend_of_the_command_line(tiny_pack: Path, tmp_path: Path) -> None:
    arguments = ["+backend=pread", "backend.threads=2", "rounds=1", "conditions=[warm]"]
    assert bench(tiny_pack, tmp_path / "out", *arguments) == 0
    record = json.loads((tmp_path / "out" / "bench_io.json").read_text())
    assert [trial["contender"] for trial in record["passes"]] == ["pread"]
    assert record["summary"][0]["interval"] is None
    assert record["config"]["backend"]["threads"] == 2


def test_a_recorded_trace(tiny_pack: Path, tmp_path: Path) -> None:
    """Each round continues the trace where the previous round ended, and wraps around; the prompt is left out."""
    choices = np.arange(5 * LAYERS * 2, dtype=np.uint16).reshape(5, LAYERS, 2) % EXPERTS
    RoutingTrace(choices, EXPERTS, 2, "m", "").save(tmp_path / "trace")
    arguments = ["requests=trace", f"trace={tmp_path / 'trace'}", "rounds=2", "conditions=[warm]"]
    assert bench(tiny_pack, tmp_path / "out", *arguments) == 0
    record = json.loads((tmp_path / "out" / "bench_io.json").read_text())
    assert [trial["stats"]["requests"] for trial in record["passes"]] == [2 * LAYERS * 2] * 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["requests=some"], "requests=some: choose from uniform, zipf, trace"),
        (["requests=trace"], "requests=trace and trace=<file> must be used together"),
        (["trace=x"], "requests=trace and trace=<file> must be used together"),
        (["requests=trace", "trace=/nowhere"], "/nowhere"),
        (["tokens=0"], "tokens=0: must be at least 1"),
        (["rounds=-1"], "rounds=-1: must be at least 1"),
        (["zipf_exponent=-1"], "zipf_exponent=-1.0: must be from 0 to 10"),
        (["conditions=[hot]"], "conditions=[hot]: choose from cold, warm"),
        (["conditions=[]"], "conditions=[]: choose from cold, warm"),
        (["conditions=[warm]", "fio=true"], "fio=true bypasses the page cache"),
        (["experts_k=17"], "experts_k=17: must be from 1 to 16"),
        (["backends=[]"], "backends=[]: name at least one"),
        (["backends=[nosuch]"], "backend=nosuch: no such backend"),
        (["backends=[3]"], "backends: 3 is neither a name nor a mapping"),
        (["backends=[{threads:3}]"], "is neither a name nor a mapping"),
        (["backends=[pread,pread]"], "backends: pread is repeated"),
        (["backends=[{name:pread,thread:3}]"], "backend.thread: no such option"),
        (["backends=[pread,{name:resident,variant:q2}]"], "no variant 'q2'; it has q4"),
        (["backends=[checkpoint]"], "is a pack; give the folder of a checkpoint"),
    ],
)
@pytest.mark.sampled(8)
def test_wrong_arguments_are_refused(
    arguments: Sequence[str], reason: str, tiny_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tiny_pack, tmp_path / "out", *arguments) == 2
    shown = capsys.readouterr().err.strip()
    assert reason in shown
    assert len(shown.splitlines()) == 1


def test_finished_trials_survive_a_failure(
    tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, count = os.preadv, 0

    def failing(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal count
        count += 1
        if count > 40:
            raise OSError(5, "Input/output error")
        return original(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    assert bench(tiny_pack, tmp_path / "out", "backends=[pread]", "rounds=5", "conditions=[warm]") == 1
    record = json.loads((tmp_path / "out" / "bench_io.json").read_text())
    assert len(record["passes"]) == 1
    assert "Input/output error" in capsys.readouterr().err
