"""Tests of the output and record of task=generate: interrupts, progress, thinking, and chat template options."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_generation import THINKING_TEMPLATE, checkpoint, scripted

from flashmoe_mlx.__main__ import main
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.prompting import load_tools
from flashmoe_mlx.generation.text_stream import Piece
from flashmoe_mlx.tasks.shared import streaming
from flashmoe_mlx.text.tokenizer import Tokenizer

RUN = [sys.executable, "-m", "flashmoe_mlx"]
LONG = "prompt=" + "Tell me about Corrow and its people. " * 100


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("thinking") / "model", THINKING_TEMPLATE, {})


def run(folder: Path, *arguments: str) -> int:
    return main([*arguments, f"hydra.run.dir={folder / 'run'}"])


def record(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "run" / "metrics.json").read_text())
    assert isinstance(found, dict)
    return found


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# Interrupts


def interrupt_at(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Interrupt this process once ``tokens`` prompt tokens are processed; return the list of later progress reports."""
    since: list[int] = []

    def report(bar: object, done: int, total: int) -> None:
        if done >= tokens:
            if not since:
                signal.raise_signal(signal.SIGINT)
            since.append(done)

    monkeypatch.setattr(streaming.PrefillBar, "__call__", report)
    return since


def test_an_interrupt_in_the_prompt(
    tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    since = interrupt_at(monkeypatch, 10)
    assert run(tmp_path, f"model.path={tiny_pack}", "prompt=A prompt of many chunks", "prefill_chunk=5") == 130
    assert len(since) == 1
    assert signal.getsignal(signal.SIGINT) is before
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "stopping after this layer" in shown.err
    assert "interrupted before the first token" in shown.err
    found = record(tmp_path)
    assert (found["interrupted"], found["finish_reason"], found["text"]) == (True, "cancelled", "")
    assert (found["token_ids"], found["prefill"]["tokens"], found["time_to_first_token"]) == ([], 10, None)


@pytest.mark.parametrize(("tokens", "code", "kept"), [(0, 130, False), (10, 130, True)])
@pytest.mark.sampled(1)
def test_an_interrupted_trace(
    tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, code: int, kept: bool
) -> None:
    interrupt_at(monkeypatch, tokens)
    options = ("task=trace", f"model.path={tiny_pack}", "prompt=A prompt of many chunks", "prefill_chunk=5")
    assert run(tmp_path, *options) == code
    assert (tmp_path / "run" / "routing.moetrace").exists() == kept


def test_interrupts_that_are_ignored_stay_ignored(
    tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A background job of a shell ignores Ctrl-C in its terminal."""
    interrupt_at(monkeypatch, 10)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(tmp_path, f"model.path={tiny_pack}", "prompt=A prompt", "prefill_chunk=5", "max_tokens=2") == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert record(tmp_path)["interrupted"] is False


def _interrupted(folder: Path, begun: str, *arguments: str) -> tuple[int, float]:
    """Interrupt the program once its log contains ``begun``; return its exit code and the seconds until it ends."""
    log = folder / "run" / "flashmoe_mlx.log"
    command = [*RUN, *arguments, "kernels=reference", f"hydra.run.dir={folder / 'run'}"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (log.exists() and begun in log.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        return process.returncode, time.monotonic() - start


def test_a_signal_while_a_long_prompt_is_read(tmp_path: Path) -> None:
    code, seconds = _interrupted(tmp_path, "model ", LONG, "prefill_chunk=1", "max_tokens=3")
    assert code == 130
    assert seconds < 5  # the whole prompt takes minutes on the slowest machine
    found = record(tmp_path)
    assert found["interrupted"] is True
    assert found["prefill"]["tokens"] < 900


# Progress


def test_a_long_prompt_has_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(terminal: bool, delay: float) -> str:
        screen = io.StringIO()
        monkeypatch.setattr(streaming, "console", Console(file=screen, force_terminal=terminal, width=120))
        monkeypatch.setattr(streaming, "_BAR_DELAY", delay)
        bar = streaming.PrefillBar()
        for done in (0, 300, 600):
            bar(done, 600)
        bar.stop()
        bar.stop()
        return screen.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    screen = shown(terminal=True, delay=0)
    assert "reading the prompt" in screen
    assert "600/600" in screen
    assert shown(terminal=True, delay=60) == ""
    assert shown(terminal=False, delay=0) == ""


# Thinking


PIECES = [
    Piece("", (1,), reasoning="Let me \x1b[5m"),
    Piece("", (2,), reasoning="see."),
    Piece("Four", (3,)),
    Piece(".", (4,)),
]


def test_thinking_is_dimmed_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    printer = streaming._Printer()
    for piece in PIECES:
        printer.show(piece)
    thinking, _, answer = screen.getvalue().partition("\n\n")
    assert "\x1b[2mLet me \ufffd[5m\x1b[0m" in thinking
    assert "\x1b[2msee.\x1b[0m" in thinking
    assert answer == "Four."


def test_thinking_goes_to_stderr_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streaming, "console", Console(stderr=True))
    printer = streaming._Printer()
    for piece in PIECES:
        printer.show(piece)
    shown = capsys.readouterr()
    assert shown.out == "Four."
    assert shown.err == "thinking:\nLet me \ufffd[5msee.\n\nanswer:\n"


def test_the_record_separates_thinking_and_answer(
    thinking_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token_ids = Tokenizer.load(thinking_model).encode("Hm.</think>\n\nYes.")
    scripted(monkeypatch, token_ids)
    assert run(tmp_path, f"model.path={thinking_model}", "prompt=Hi", f"max_tokens={len(token_ids)}") == 0
    assert capsys.readouterr().out == "Yes.\n"
    found = record(tmp_path)
    assert (found["reasoning"], found["text"], found["ended_in_thinking"]) == ("Hm.", "Yes.", False)
    assert found["token_ids"] == token_ids


def test_max_tokens_inside_thinking_is_explained(
    thinking_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, b"Hm, this is")
    assert run(tmp_path, f"model.path={thinking_model}", "prompt=Hi", "max_tokens=11") == 0
    shown = capsys.readouterr()
    assert shown.out == "\n"
    assert (
        "no answer: max_tokens=11 was reached while the model was thinking; "
        "max_tokens=4096 leaves room for thinking and an answer; thinking=false skips thinking\n"
    ) in shown.err
    found = record(tmp_path)
    assert (found["reasoning"], found["text"], found["ended_in_thinking"]) == ("Hm, this is", "", True)

    scripted(monkeypatch, b"Yes.")
    assert run(tmp_path / "2", f"model.path={thinking_model}", "prompt=Hi", "max_tokens=4", "thinking=false") == 0
    shown = capsys.readouterr()
    assert shown.out == "Yes.\n"
    assert "no answer" not in shown.err


def test_advice_about_thinking_suits_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template always starts thinking."""
    folder = checkpoint(tmp_path / "model", "{{ messages[0].content }}<think>\n")
    scripted(monkeypatch, b"Hm")
    assert run(tmp_path, f"model.path={folder}", "prompt=Hi", "max_tokens=2") == 0
    shown = capsys.readouterr().err
    assert "no answer: max_tokens=2 was reached" in shown
    assert "thinking=false" not in shown


def test_system_tools_and_template_options(thinking_model: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools, all [v2].json"
    tools.write_text(json.dumps([{"type": "function", "function": {"name": "lamp"}}]))
    options = [f"model.path={thinking_model}", "prompt=Hi", "max_tokens=1"]
    assert run(tmp_path / "plain", *options) == 0
    asked = ["system=Be brief, it's late.", f"tools={tools}", "thinking=false", "template_options={effort:low}"]
    assert run(tmp_path / "all", *options, *asked) == 0
    longer = record(tmp_path / "all")["prefill"]["tokens"] - record(tmp_path / "plain")["prefill"]["tokens"]
    added = "system: Be brief, it's late.\n" + "lamp\n" + "low" + "\n</think>\n\n"
    assert longer == len(Tokenizer.load(thinking_model).encode(added))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        ("[", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("{}", "tools must be a list"),
        ('[{"type": "function"}]', "tools[0].name must be text"),
    ],
)
def test_invalid_tools(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "tools.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as raised:
        load_tools(path)
    assert str(raised.value).startswith(str(path))
    assert reason in str(raised.value)


def test_a_mistake_in_a_request_is_one_line(
    tiny_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, f"model.path={tiny_pack}", "tools=no-such-file.json") == 2
    assert capsys.readouterr().err == "flashmoe_mlx: no-such-file.json: no such file\n"


def test_the_table_shows_the_sampling_options(
    tiny_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "1", f"model.path={tiny_pack}", "max_tokens=2") == 0
    assert "sampling: greedy\n" in capsys.readouterr().err
    options = (f"model.path={tiny_pack}", "max_tokens=2", "temperature=0.7", "presence_penalty=1.5", "seed=1")
    assert run(tmp_path / "2", *options) == 0
    assert "sampling: temperature 0.7, presence_penalty 1.5\n" in capsys.readouterr().err
    assert record(tmp_path / "2")["sampling"]["presence_penalty"] == 1.5
