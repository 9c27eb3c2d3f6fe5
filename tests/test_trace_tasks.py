"""task=trace and task=simulate: records, output and refused arguments."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pack_oracle import assert_one_line

from flashmoe_mlx.cli.application import run as run_command_line
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.research.traces.random_traces import uniform_trace
from flashmoe_mlx.research.traces.recorder import prompt_hash


def run(folder: Path, *arguments: str) -> int:
    return run_command_line([*arguments, f"hydra.run.dir={folder / 'run'}"])


@pytest.fixture(scope="module")
def trace_path(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    path = folder / "some.moetrace"
    options = ("task=trace", f"model.path={tiny_pack}", "prompt=One, two", "max_tokens=30", f"out={path}")
    assert run(folder, *options) == 0
    return path


def test_trace_records_a_generation(trace_path: Path) -> None:
    trace = RoutingTrace.load(trace_path)
    assert (trace.experts.shape[1:], trace.num_experts) == ((4, 4), 16)
    assert len(trace.experts) == trace.prompt_tokens + 29
    assert trace.model == "tiny (random weights)@recipe 1, seed 0, 4 bits"
    assert trace.record_bytes > 0
    assert trace.prompt_xxh3 != prompt_hash([])


def test_a_trace_is_saved_in_the_run_directory_by_default(
    tiny_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "task=trace", f"model.path={tiny_pack}", "prompt=Hello", "max_tokens=3") == 0
    path = tmp_path / "run" / "routing.moetrace"
    assert len(RoutingTrace.load(path).experts) > 2
    shown = capsys.readouterr().err
    assert f"task=simulate trace={path}" in shown
    assert "chose 4 of 16 experts in each of 4 layers" in shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("task=trace", "out=no-such-folder/a.moetrace"), "no such folder"),
        (("task=trace", "out={trace}"), "already exists"),
        (("task=simulate",), "task=trace records one"),
        (("task=simulate", "trace=no-such-file"), "cannot be read"),
        (("task=simulate", "trace={trace}", "policies=[fifo]"), "no such policy"),
        (("task=simulate", "trace={trace}", "policies=[]"), "name at least one"),
        (("task=simulate", "trace={trace}", "slots=[4,17]"), "a layer has 16 experts"),
        (("task=simulate", "trace={trace}", "prefetch_accuracy=[1.5]"), "from 0 to 1"),
        (("task=simulate", "trace={trace}", "hot={other}"), "a different number"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    arguments: tuple[str, ...], reason: str, trace_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uniform_trace(4, 2, 8, 2, 0).save(tmp_path / "other.moetrace")
    filled = [argument.format(trace=trace_path, other=tmp_path / "other.moetrace") for argument in arguments]
    assert run(tmp_path, *filled) == 2
    shown = capsys.readouterr().err.strip()
    assert reason in shown
    assert_one_line(Exception(shown.splitlines()[-1]))


def simulated(trace_path: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    assert run(folder, "task=simulate", f"trace={trace_path}", *arguments) == 0
    record = json.loads((folder / "run" / "simulate.json").read_text())
    assert isinstance(record, dict)
    return record


def test_simulate_shows_curves(trace_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = simulated(trace_path, tmp_path, "scopes=[layer,global]")
    shown = capsys.readouterr().err
    for text in ("hit rate in decode", "belady", "belady global", "same as the last token", "right 70%", "GiB"):
        assert text in shown
    assert (tmp_path / "run" / "hit_rates.png").read_bytes().startswith(b"\x89PNG")
    curve = {(point["policy"], point["scope"], point["slots"]): point for point in record["curves"]}
    assert curve["lru", "layer", 16]["decode"]["evictions"] == 0
    assert curve["belady", "layer", 8]["hit_rate"] >= curve["lru", "layer", 8]["hit_rate"]
    assert record["record_bytes"] == RoutingTrace.load(trace_path).record_bytes
    assert record["prefetch"]["policies"]["right 90%"]["useful"] > 0


def test_missing_matplotlib_is_reported(
    trace_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert simulated(trace_path, tmp_path, "policies=[lru]", "slots=[8]")["curves"]
    assert "pip install 'flashmoe_mlx[research]'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "hit_rates.png").exists()
