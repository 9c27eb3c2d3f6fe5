"""Tests of run directories: claims by one run at a time, and recognition of records inside a pack."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoints import GEOMETRIES, write_checkpoint

from flashmoe_mlx.cli.application import run
from flashmoe_mlx.cli.claims import Claims, claims
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.tasks.shared.run_directory import holds_only_records

FAST = ["raw=true", "prompt=Hello", "max_tokens=2"]


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    first, second = Claims(), Claims()
    first.take(tmp_path / "[v2]" / "run", "hydra.run.dir")
    with pytest.raises(InputError) as raised:
        second.take(tmp_path / "[v2]" / "run", "hydra.run.dir")
    assert raised.value.code == "folder_in_use"
    first.release()
    second.take(tmp_path / "[v2]" / "run", "hydra.run.dir")
    second.release()
    second.release()


@pytest.mark.parametrize(("key", "more"), [("hydra.run.dir", []), ("hydra.sweep.dir", ["-m", "experts_k=1,2"])])
@pytest.mark.sampled(1)
def test_two_runs_at_once_with_one_folder(
    key: str, more: list[str], tiny_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"model.path={tiny_pack}", *FAST, *more, f"{key}={tmp_path / 'run'}"]
    program = "import sys; from pathlib import Path; from flashmoe_mlx.cli.claims import Claims; "
    program += "Claims().take(Path(sys.argv[1]), ''); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert run(arguments) == 2
        assert list((tmp_path / "run").iterdir()) == []
        other.kill()
    line = capsys.readouterr().err
    assert line == f"flashmoe_mlx: {tmp_path / 'run'}: another run is writing its record there; choose another {key}\n"
    assert run(arguments) == 0  # the claim ended with the process


def test_a_run_releases_its_directory(tiny_pack: Path, tmp_path: Path) -> None:
    for arguments, code in ((FAST, 0), (["experts_k=99"], 2)):
        assert run([f"model.path={tiny_pack}", *arguments, f"hydra.run.dir={tmp_path / str(code)}"]) == code
        with claims() as taken:
            taken.take(tmp_path / str(code), "hydra.run.dir")


def test_a_failure_has_a_code(tiny_pack: Path, tmp_path: Path) -> None:
    codes = {}
    for name, argument in (("path", "model.path=~nosuchuser/x"), ("k", "experts_k=99"), ("type", "seed=x")):
        assert run([f"model.path={tiny_pack}", argument, f"hydra.run.dir={tmp_path / name}"]) == 2
        failure = json.loads((tmp_path / name / "failure.json").read_text())
        assert failure["exit_code"] == 2
        codes[name] = failure["code"]
    assert codes == {"path": "no_home_folder", "k": "invalid_input", "type": "invalid_value"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", GEOMETRIES["plain"], 1, "mlx4")


@pytest.mark.parametrize("folder", [".", "run", "deep/er/run", "outputs/[v2]"])
@pytest.mark.sampled(2)
def test_the_record_of_packing_may_lie_in_the_pack(
    folder: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pack"
    out.mkdir()
    monkeypatch.chdir(out)
    arguments = ["task=pack", "out=.", f"hydra.run.dir={folder}"]
    assert run([*arguments, f"source={tmp_path / 'nothing'}"]) == 2  # also leaves its record there
    assert run([*arguments, f"source={checkpoint}"]) == 0
    assert set(open_pack(out).experts) == {"q4"}
    assert run(["task=pack", "verify=true", f"out={out}"]) == 0


def test_other_files_are_not_ignored(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "pack"
    (out / "outputs").mkdir(parents=True)
    (out / "outputs" / "thesis.txt").write_text("")
    monkeypatch.chdir(out)
    assert run(["task=pack", f"source={checkpoint}", "out=."]) == 2
    assert not holds_only_records(out / "outputs")
    (out / "outputs" / "thesis.txt").unlink()
    assert holds_only_records(out / "outputs")
    (out / "empty").mkdir()
    assert not holds_only_records(out / "empty")


@pytest.mark.parametrize("name", ["metrics.json", "bench.json", "bench_io.json", "evaluate.json", "routing.moetrace"])
@pytest.mark.sampled(2)
def test_measurements_are_never_overwritten(
    name: str, tiny_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "run"
    (record / ".hydra").mkdir(parents=True)
    (record / ".hydra" / "config.yaml").write_text("earlier")
    (record / name).write_text("{}")
    before = {path: path.read_bytes() for path in record.rglob("*") if path.is_file()}
    for task in ("generate", "bench", "bench_io", "evaluate", "trace", "estimate", "doctor"):
        model = [] if task == "doctor" else [f"model.path={tiny_pack}"]
        assert run([f"task={task}", *model, f"hydra.run.dir={record}"]) == 2
    sweep = ["-m", "hydra.sweep.subdir=run", f"hydra.sweep.dir={tmp_path}"]
    assert run([f"model.path={tiny_pack}", *FAST, *sweep]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum("holds the record of another run; choose another hydra.run.dir" in line for line in lines) == 7
    assert sum("holds the record of another run; choose another hydra.sweep.subdir" in line for line in lines) == 1
    assert {key: record_of(key) for key in before if ".hydra" not in key.parts} == {
        key: value for key, value in before.items() if ".hydra" not in key.parts
    }
    assert not (record / "failure.json").exists()


def record_of(path: Path) -> bytes:
    return path.read_bytes()


def test_a_later_attempt_replaces_the_failure(tiny_pack: Path, tmp_path: Path) -> None:
    arguments = [f"model.path={tiny_pack}", *FAST, f"hydra.run.dir={tmp_path}"]
    for argument, code in (("experts_k=99", "invalid_input"), ("seed=x", "invalid_value")):
        assert run([*arguments, argument]) == 2
        assert json.loads((tmp_path / "failure.json").read_text())["code"] == code
    assert run(arguments) == 0
    assert not (tmp_path / "failure.json").exists()


def test_a_sweep_without_jobs_leaves_its_directory_and_stdout_free(
    tiny_pack: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-m", f"model.path={tiny_pack}", *FAST, f"hydra.sweep.dir={tmp_path}"]
    assert run([*arguments, "backend=pread,nosuch"]) == 2
    print("later output", flush=True)
    assert capfd.readouterr().out.endswith("later output\n")
    assert run([*arguments, "backend=pread,mmap"]) == 0
    assert run([*arguments, "backend=pread,mmap"]) == 2
