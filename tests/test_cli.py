"""Tests of the program as users start it, in a separate process."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe_mlx.cli.application import run
from flashmoe_mlx.pack.manifest import write_manifest
from flashmoe_mlx.pack.opening import open_pack

RUN = [sys.executable, "-m", "flashmoe_mlx"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def flashmoe(
    *arguments: str, cwd: Path, cache: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"FLASHMOE_CACHE": str(cache)} if cache else {})
    return subprocess.run(
        [*RUN, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, errors="replace"
    )


def error_line(code: int, shown: str, expected: int = 2) -> str:
    """Check that ``shown`` is one error line, and return its message."""
    assert code == expected, shown
    lines = shown.strip().splitlines()
    assert len(lines) == 1, shown
    assert lines[0].startswith("flashmoe_mlx: ")
    return lines[0].removeprefix("flashmoe_mlx: ")


def mistake(result: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """Check that a process failed with one error line, and return its message."""
    return error_line(result.returncode, result.stderr, code)


def records(folder: Path) -> list[Path]:
    return sorted(folder.glob("outputs/*/*"))


def test_the_users_line_on_a_fresh_machine(tmp_path: Path, cache: Path) -> None:
    result = flashmoe("+backend=pread", "+experts_k=4", "max_tokens=4", cwd=tmp_path, cache=cache)
    assert result.returncode == 0, result.stderr
    assert "prefill" in result.stderr
    assert "decode" in result.stderr
    (record,) = records(tmp_path)
    metrics = json.loads((record / "metrics.json").read_text())
    assert metrics["experts_k"] == 4
    assert metrics["text"] + "\n" == result.stdout
    assert len(metrics["token_ids"]) == 4
    assert metrics["decode"]["experts_requested"] == 3 * 4 * metrics["model"]["config"]["num_layers"]
    environment = json.loads((record / "environment.json").read_text())
    assert environment["packages"]["mlx"]
    assert environment["command"][-3:] == ["+backend=pread", "+experts_k=4", "max_tokens=4"]
    assert (record / ".hydra" / "config.yaml").is_file()
    assert "kernels" in (record / "flashmoe_mlx.log").read_text()


def test_a_sweep_leaves_a_directory_for_each_run(tmp_path: Path, cache: Path) -> None:
    result = flashmoe("-m", "+backend=pread", "+experts_k=2,99,3", "max_tokens=2", cwd=tmp_path, cache=cache)
    assert result.returncode == 2
    assert "experts_k=99: must be from 1 to 64" in result.stderr
    table = [line.split() for line in result.stderr.partition("\njob ")[2].splitlines()]
    assert table[0][:2] == ["decode", "tok/s"]
    assert [row[:2] for row in table[1:3]] == [["0", "experts_k=2"], ["2", "experts_k=3"]]
    runs = sorted(tmp_path.glob("multirun/*/*/[0-9]*"))
    assert [run.name for run in runs] == ["0", "1", "2"]
    measured = [run / "metrics.json" for run in runs]
    assert [path.exists() for path in measured] == [True, False, True]
    assert [json.loads(path.read_text())["experts_k"] for path in (measured[0], measured[2])] == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["backend=nosuch"],
            "backend=nosuch: no such backend; choose from auto, checkpoint, io_uring, mmap, pack2, pread, ",
        ),
        (["experts_k=0"], "experts_k=0: must be from 1 to 16"),
        (["experts_k=-1"], "experts_k=-1: must be from 1 to 16"),
        (["experts_k=17"], "experts_k=17: must be from 1 to 16"),
        (["experts_k=four"], "experts_k=four: must be a whole number or null"),
        (["model=nosuch"], "model=nosuch: no such model; choose from demo, synthetic; for a folder: model.path=nosuch"),
        (["prompt=" + "x" * 300], "the prompt has 325 tokens; this model's context holds 256"),
        (["backend.threads=many"], "must be an integer from 1 to 1024"),
        (["backend="], "backend=: the name is missing"),
        (["--nosuch"], "--nosuch: no such option; --help lists keys and options"),
        (["experts_k=2,4"], "experts_k=2,4: several values are a sweep, which needs -m"),
        (["task=pack", "out=x"], "task=pack needs source="),
        (["task=pack", "source=nowhere", "out=x"], "source=nowhere: neither a folder nor a hub id"),
        (["task=pack", "verify=true"], "verify=true needs out="),
    ],
)
def test_mistakes_are_one_line(
    tiny_pack: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [] if "task=pack" in arguments else [f"model.path={tiny_pack}"]
    code = run([*model, *arguments])
    assert message in error_line(code, capsys.readouterr().err)


def test_a_mistake_ends_the_program(tmp_path: Path) -> None:
    result = flashmoe("backend=nosuch", cwd=tmp_path)
    assert "backend=nosuch: no such backend" in mistake(result)
    assert result.stdout == ""


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    result = flashmoe("model.path=nowhere", "debug=true", cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "model.path=nowhere: no such folder" in result.stderr


def test_an_unwritable_folder(tiny_pack: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        # Root can write to any folder, but not below a file.
        (tmp_path / "outputs").write_text("")
    else:
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    line = mistake(flashmoe(f"model.path={tiny_pack}", cwd=tmp_path), code=1)
    assert "hydra.run.dir=<folder>" in line


@pytest.fixture
def endless_pack(tiny_pack: Path, tmp_path: Path) -> Path:
    """Return a model without an end token."""
    folder = Path(shutil.copytree(tiny_pack, tmp_path / "endless"))
    pack = open_pack(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    (folder / "generation_config.json").write_text("{}")
    layouts = {name: experts.layout for name, experts in pack.experts.items()}
    write_manifest(folder, pack.config, layouts, pack.manifest["source"], [])
    return folder


def test_an_interrupt_keeps_the_measurements(tmp_path: Path, endless_pack: Path) -> None:
    with subprocess.Popen(
        [*RUN, f"model.path={endless_pack}", "max_tokens=200", "profile=true"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"stopping after this layer" in errors
    (record,) = records(tmp_path)
    metrics = json.loads((record / "metrics.json").read_text())
    assert metrics["interrupted"] is True
    assert 0 < len(metrics["token_ids"]) < 200


def test_a_reader_of_stdout_that_disconnects(tiny_pack: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [*RUN, f"model.path={tiny_pack}", "max_tokens=200"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def test_text_that_the_terminal_cannot_show(tmp_path: Path, tiny_pack: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [*RUN, f"model.path={tiny_pack}", "max_tokens=64", "temperature=2", "seed=1"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (record,) = records(tmp_path)
    assert not json.loads((record / "metrics.json").read_text())["text"].isascii()


def test_a_reader_of_stderr_that_disconnects(tiny_pack: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [*RUN, f"model.path={tiny_pack}", "max_tokens=20"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        process.stderr.close()
        assert process.stdout is not None
        answer = process.stdout.read()
    assert process.returncode == 0
    (record,) = records(tmp_path)
    assert json.loads((record / "metrics.json").read_text())["text"] + "\n" == answer.decode()


def test_a_sweep_over_texts(tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "it's, odd [v2]"
    odd.symlink_to(tiny_pack)
    quoted = str(odd).replace("'", "\\'")
    arguments = [f"model.path='{tiny_pack}','{quoted}'", "prompt='Hello','Who, me?'", "max_tokens=2", "raw=true"]
    assert run(["-m", *arguments, f"hydra.sweep.dir={tmp_path / 'sweep'}"]) == 0
    found = [json.loads((tmp_path / "sweep" / str(job) / "metrics.json").read_text()) for job in range(4)]
    assert [metrics["model"]["path"] for metrics in found] == [str(tiny_pack)] * 2 + [str(odd)] * 2
    assert [metrics["prefill"]["tokens"] for metrics in found] == [len("Hello"), len("Who, me?")] * 2
