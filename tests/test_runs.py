"""Recorded runs in a data frame, sweeps with failed jobs, and contradictory keys."""

import json
from pathlib import Path

import pytest
from pack_oracle import assert_one_line

from flashmoe_mlx.cli.application import run
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.research import load_runs

FAST = ["raw=true", "prompt=Hello", "max_tokens=4"]


@pytest.fixture(scope="module")
def recorded(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, a sweep in which some jobs fail, and a benchmark."""
    top = tmp_path_factory.mktemp("outputs")
    model = f"model.path={tiny_pack}"
    assert run([model, *FAST, f"hydra.run.dir={top / 'one'}", "prefetch=next_router"]) == 0
    sweep = ["-m", "+backend=pread,pack2,mmap", "+experts_k=2,3", f"hydra.sweep.dir={top / 'sweep'}"]
    assert run([model, *FAST, *sweep]) == 2
    bench = [
        "task=bench",
        "raw=true",
        "prompt=Hello",
        "tokens=3",
        "rounds=2",
        "backends=[pread,{name:pread,threads:2}]",
    ]
    assert run([model, *bench, "plot=false", f"hydra.run.dir={top / 'bench'}"]) == 0
    return top


def test_all_records_in_one_frame(recorded: Path) -> None:
    frame = load_runs(recorded)
    assert frame["run"].tolist() == ["bench"] * 8 + ["one"] + [f"sweep/{job}" for job in range(6)]
    ran = frame[frame["error"].isna()]
    assert (ran["decode_tokens_per_second"] > 0).all()
    assert ran["backend"].tolist() == ["pread"] * 9 + ["pread", "pread", "mmap", "mmap"]
    assert ran["experts_k"].tolist() == [4] * 9 + [2, 3, 2, 3]
    bench = frame[frame["task"] == "bench"]
    assert sorted(bench["setting"].unique()) == ["pread", "pread threads=2"]
    assert sorted(bench["backend.threads"].unique()) == [2, 4]
    assert bench.groupby(["setting", "condition"])["round"].count().tolist() == [2] * 4
    row = frame[frame["run"] == "one"].iloc[0]
    metrics = json.loads((recorded / "one" / "metrics.json").read_text())
    assert row["decode_bytes_per_token"] == metrics["decode"]["bytes_per_token"]
    assert row["accuracy"] == metrics["guesses"]["accuracy"]
    assert row["decode_p50_seconds"] == metrics["decode"]["step_seconds"]["p50"]
    assert row["condition"] == "as found"
    shares = [name for name in frame if name.startswith("decode_") and name.endswith("_share")]
    assert row[shares].sum() == pytest.approx(1)


def test_failed_jobs_have_an_error(recorded: Path) -> None:
    frame = load_runs(recorded / "sweep")
    failed = frame[frame["error"].notna()]
    assert failed["run"].tolist() == ["2", "3"]
    assert failed["error"].str.contains("no variant 'q2'").all()
    assert len(frame) == 6


def test_a_sweep_lists_failed_jobs(tiny_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-m", f"model.path={tiny_pack}", *FAST, "experts_k=2,99", "backend=pread,mmap"]
    folder = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    assert run([*arguments, folder]) == 2
    *_, title, first, second = capsys.readouterr().err.splitlines()
    assert title == "flashmoe_mlx: 2 of 4 jobs failed; the records of all other jobs are complete:"
    assert first.startswith("  2 experts_k=99 backend=pread: experts_k=99: must be from 1 to 16")
    assert second.startswith("  3 experts_k=99 backend=mmap: ")
    assert [(tmp_path / "sweep" / str(job) / "metrics.json").exists() for job in range(4)] == [True, True, False, False]
    before = {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    assert run([*arguments, folder]) == 2
    assert "holds an earlier sweep; choose another hydra.sweep.dir" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*") if path.is_file()}


def test_a_refused_run_does_not_change_an_earlier_record(tiny_pack: Path, tmp_path: Path) -> None:
    arguments = [f"model.path={tiny_pack}", *FAST, f"hydra.run.dir={tmp_path}"]
    assert run(arguments) == 0
    assert run(arguments) == 2
    assert not (tmp_path / "failure.json").exists()
    assert len(load_runs(tmp_path)) == 1


@pytest.mark.thorough
def test_a_sweep_over_all_backends(tiny_pack: Path, tmp_path: Path) -> None:
    every = "backend=glob(*,exclude=auto)"  # auto measures the machine for two minutes
    assert run(["-m", f"model.path={tiny_pack}", *FAST, every, f"hydra.sweep.dir={tmp_path}"]) == 2
    frame = load_runs(tmp_path)
    assert {"pread", "mmap", "ram_hybrid", "resident"} <= set(frame["backend"].dropna())
    assert frame["error"].notna().sum() >= 2  # pack2 and checkpoint
    assert frame["text"].dropna().nunique() == 1


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    assert load_runs(tmp_path).empty
    with pytest.raises(InputError) as caught:
        load_runs(tmp_path / "nowhere")
    assert caught.value.code == "no_such_folder"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 3}', "nonsense"])
def test_damaged_records_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(InputError) as caught:
        load_runs(tmp_path)
    assert caught.value.code == "invalid_record"
    assert "metrics.json" in str(caught.value)
    assert_one_line(caught.value)


def test_missing_pandas_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(InputError) as caught:
        load_runs(tmp_path)
    assert caught.value.code == "missing_extra"
    assert "pip install 'flashmoe_mlx[research]'" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["task=pack", "verify=true", "out={pack}", "source=x"], "contradiction"),
        (["task=pack", "verify=true", "out={pack}", "delete_source=true"], "contradiction"),
        (["task=pack", "source={pack}", "bits=[2]", "delete_source=true"], "contradiction"),
        (["task=pack", "source={pack}", "bits=[2]", "packed_experts=x"], "contradiction"),
        (["task=bench_io", "model.path={pack}", "zipf_exponent=2"], "contradiction"),
        (["task=bench_io", "model.path={pack}", "requests=trace", "trace=x", "seed=1"], "contradiction"),
        (["task=bench_io", "model.path={pack}", "seed=-1"], "out_of_range"),
        (["task=simulate", "trace=x", "policies=[lru]", "hot=y"], "contradiction"),
        (["task=simulate", "trace=x", "slots=[]"], "empty_list"),
        (["task=estimate", "model.path={pack}", "bits=[4,2]"], "unknown_choice"),
        (["task=estimate", "model.path={pack}", "probe_seconds=1e9"], "out_of_range"),
        (["task=estimate", "model.path={pack}", "memory_gib=1e9"], "out_of_range"),
        (["task=evaluate", "model.path={pack}", "kinds=[]"], "empty_list"),
    ],
)
def test_contradictory_and_invalid_keys_are_refused(
    arguments: list[str], code: str, tiny_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(pack=tiny_pack) for argument in arguments]
    assert run([*filled, f"hydra.run.dir={tmp_path}"]) == 2
    assert json.loads((tmp_path / "failure.json").read_text())["code"] == code
    assert capsys.readouterr().err.count("\n") == 1
