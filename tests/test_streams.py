"""Tests of output: disconnected readers, full disks, and text that looks like markup."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from flashmoe_mlx.cli.application import run
from flashmoe_mlx.cli.error_reports import message
from flashmoe_mlx.console.output import activity, byte_progress, console, print_table, show
from flashmoe_mlx.console.streams import Notes, OutputError, print_answer, say
from flashmoe_mlx.research.figures import hit_rate_figure, save
from flashmoe_mlx.research.traces.curves import curves
from flashmoe_mlx.research.traces.random_traces import uniform_trace

ODD = ["[v2]", "qwen [mlx]", "x[/y]z", ":100:", "[bold]b[/bold]", "http://[::1]/x", "\\[a]", "[link=x]"]


class Broken(io.StringIO):
    """Stream whose reader has disconnected, or whose disk is full."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("text", ODD)
def test_text_is_shown_literally(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(f"record: /a/{text}")
    say(f"flashmoe_mlx: {text}")
    table = Table(title=f"title {text}")
    table.add_column(f"head {text}")
    table.add_row(f"cell {text}")
    print_table(table)
    with activity() as announce:
        announce(f"doing {text}")
    with byte_progress() as progress:
        progress.stage(f"layer {text}", 10)
        progress.advance(10)
    shown = capsys.readouterr().err
    for start in ("record: /a/", "flashmoe_mlx: ", "title ", "head ", "cell "):
        assert start + text in shown


@pytest.mark.parametrize(("width", "exchanged"), [(80, False), (40, True), (8, False)])
def test_a_table_that_is_wider_than_the_terminal(
    width: int, exchanged: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_width", width)
    table = Table(box=None, pad_edge=False)
    for heading in ("", "tokens per second", "gigabytes per second"):
        table.add_column(heading)
    table.add_row("prefill", "1.5", "2")
    table.add_row("decode", "3", "4")
    print_table(table)
    rows = [re.split(r"  +", line.strip()) for line in capsys.readouterr().err.splitlines()]
    if exchanged:
        assert rows == [["prefill", "decode"], ["tokens per second", "1.5", "3"], ["gigabytes per second", "2", "4"]]
    else:
        assert rows[1:] == [["prefill", "1.5", "2"], ["decode", "3", "4"]]


def test_no_console_interprets_markup() -> None:
    """All consoles come from ``literal_console``; rich's default console interprets brackets and colons."""
    for path in (Path(__file__).parent.parent / "flashmoe_mlx").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert path.name == "output.py" or not re.search(r"\bConsole\(", text), path
        assert ".status(" not in text or path.name == "output.py", path
    assert (console._markup, console._emoji, console._highlight) == (False, False, False)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_notes_never_fail(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Broken(number))
    show("a note")
    say("a line")
    print("a line", file=Notes())  # type: ignore[call-overload]
    monkeypatch.setattr("sys.stderr", None)
    show("a note")
    say("a line")


def test_an_answer_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Broken(errno.EPIPE))
    with pytest.raises(BrokenPipeError):
        print_answer("x")
    monkeypatch.setattr("sys.stdout", Broken(errno.ENOSPC))
    with pytest.raises(OutputError, match="stdout: No space left on device") as raised:
        print_answer("x")
    assert raised.value.code == "output_failed"
    monkeypatch.setattr("sys.stdout", None)
    print_answer("x")


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EPIPE, 0)])
def test_a_lost_answer_is_reported(
    number: int,
    code: int,
    tiny_pack: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdout", Broken(number))
    arguments = [f"model.path={tiny_pack}", "raw=true", "prompt=Hello", "max_tokens=9", f"hydra.run.dir={tmp_path}"]
    assert run(arguments) == code
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["text"]
    assert metrics["interrupted"] is True
    assert ("flashmoe_mlx: stdout: No space left" in capsys.readouterr().err) == (code == 1)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--cfg", "job"], ["--hydra-help"]])
def test_a_full_disk_behind_other_output(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout", Broken(errno.ENOSPC))
    assert run(arguments) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("flashmoe_mlx: stdout: No space left on device")
    assert shown.count("\n") == 1


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    remedy = "free some space there; hydra.run.dir=<folder> puts the record of the run elsewhere"
    assert message(full, tmp_path) == f"{tmp_path}: No space left on device; {remedy}"
    full.filename = "/elsewhere/x"
    assert message(full, tmp_path) == "/elsewhere/x: No space left on device; free some space there"
    refused = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))
    assert message(refused, tmp_path).endswith(remedy.partition("; ")[2])


FULL = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
from flashmoe_mlx.__main__ import main
model = "model.path=" + sys.argv[1]
codes = []
commands = [["prompt=hi", "max_tokens=2"], ["-m", "prompt=hi", "experts_k=1,2"], ["task=evaluate", "limit=1"]]
commands += [["task=bench", "rounds=1", "tokens=2", "plot=false"], ["task=trace", "prompt=hi"]]
for number, more in enumerate(commands):
    codes.append(main([model, *more, f"hydra.run.dir=run{number}", f"hydra.sweep.dir=sweep{number}"]))
sys.exit(codes != [1] * 5)
"""


def test_a_full_disk_below_the_run_directory(tiny_pack: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tiny_pack)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = result.stderr.splitlines()
    assert result.returncode == 0, lines
    for line, folder in zip(lines, ("run0", "sweep1", "run2", "run3", "run4"), strict=True):
        assert line.startswith(f"flashmoe_mlx: {folder}: File too large; free some space there; hydra.run.dir=<folder>")


@pytest.mark.parametrize("place", ["deleted", "${d}"])
def test_working_folders_that_cannot_be_used(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / place
    folder.mkdir()
    monkeypatch.chdir(folder)
    if place == "deleted":
        folder.rmdir()
    assert run(["prompt=hi"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "working folder" in line
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("choice", ["disabled", "none", "stdout"])
@pytest.mark.sampled(1)
def test_logging_configurations_of_hydra(choice: str, tiny_pack: Path, tmp_path: Path) -> None:
    arguments = [f"model.path={tiny_pack}", "raw=true", "prompt=Hi", "max_tokens=2", f"hydra.run.dir={tmp_path}"]
    program = "import sys; from flashmoe_mlx.__main__ import main; sys.exit(main(sys.argv[1:]))"
    logging = [f"hydra/job_logging={choice}"] + ([f"hydra/hydra_logging={choice}"] if choice != "stdout" else [])
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments, *logging], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "flashmoe_mlx.log").exists()


@pytest.mark.parametrize("title", ["a$\\q$", "$x_$", "[v2] $", "100 %"])
def test_titles_of_figures_are_shown_literally(title: str, tmp_path: Path) -> None:
    trace = uniform_trace(8, 2, 8, 2, 0)
    found = list(curves(trace, ["lru"], [4, 8], ["layer"]))
    figure = hit_rate_figure(found, title)
    save(figure, tmp_path / "x.png")
    assert figure.axes[0].get_title(loc="left") == title
    with pytest.raises(OSError, match="No such file") as raised:
        save(figure, tmp_path / "no" / "x.png")
    assert raised.value.filename == str(tmp_path / "no" / "x.png")


def test_an_error_is_one_line_for_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["model.path=a\nb\x1b[31m\u2028é[v2]:100:", f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("flashmoe_mlx: model.path=a\\nb\\x1b[31m\\u2028é[v2]:100:: no such folder")
    assert line.count("\n") == 1
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["error"].startswith("model.path=a\nb\x1b[31m")


@pytest.mark.parametrize(
    ("stream", "arguments"),
    [
        pytest.param(stream, arguments, marks=[pytest.mark.thorough] if stream != "full" and repeated else [])
        for stream in ("full", "closed", "left")
        for repeated, arguments in (
            (False, ["--cfg", "job"]),
            (True, ["--cfg", "all"]),
            (True, ["--info", "all"]),
            (True, ["--hydra-help"]),
            (False, ["--help"]),
        )
    ],
)
@pytest.mark.sampled(4)
def test_output_of_options_that_cannot_be_written(arguments: list[str], stream: str, tmp_path: Path) -> None:
    redirect = {"full": "> /dev/full", "closed": ">&-", "left": "| true"}[stream]
    if stream == "full" and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    command = f'set -o pipefail; "$0" -m flashmoe_mlx "$@" {redirect}'
    result = subprocess.run(
        ["bash", "-c", command, sys.executable, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == (1 if stream == "full" else 0), result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    assert "flashmoe_mlx: " not in result.stderr.replace("flashmoe_mlx: stdout: No space left", "")
    assert ("stdout: No space left" in result.stderr) == (stream == "full")
