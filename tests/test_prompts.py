"""Tests of prompts from files and stdin in every task with a prompt."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from flashmoe_mlx.cli.application import run
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.research.traces.recorder import prompt_hash
from flashmoe_mlx.tasks import bench, generate
from flashmoe_mlx.tasks.shared.prompts import with_prompt
from flashmoe_mlx.text.tokenizer import Tokenizer

LINE = "Grüße, «it's» ${x} [v2]\nand 'more'"


class Stdin(io.TextIOWrapper):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="ascii")


def read(tiny_pack: Path, path: Path, data: bytes) -> str:
    path.write_bytes(data)
    config = with_prompt(generate.Config(prompt_file=str(path)), tiny_pack)
    assert config.prompt_file is None
    return config.prompt


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (LINE.encode(), LINE),
        (f"{LINE}\n".encode(), LINE),
        (f"{LINE}\r\n".encode(), LINE),
        (f"{LINE}\n\n".encode(), f"{LINE}\n"),
        (f"\ufeff{LINE}".encode(), LINE),
        (b" \n", " "),
        (b"???", "???"),
        (b"-", "-"),
        (b"a\0b", "a\0b"),
    ],
)
def test_a_file_is_taken_literally(tiny_pack: Path, tmp_path: Path, data: bytes, text: str) -> None:
    assert read(tiny_pack, tmp_path / "prompt.txt", data) == text


@pytest.mark.parametrize(
    "config", [generate.Config(prompt="-"), generate.Config(prompt_file="-"), bench.Config(prompt="-")]
)
def test_stdin_is_read_once(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch, config: generate.Config | bench.Config
) -> None:
    monkeypatch.setattr("sys.stdin", Stdin(LINE.encode()))
    assert with_prompt(config, tiny_pack).prompt == LINE
    assert with_prompt(config, tiny_pack).prompt == LINE  # the next job of a sweep


def test_a_prompt_on_the_command_line_is_unchanged(tiny_pack: Path) -> None:
    config = generate.Config(prompt="- not stdin")
    assert with_prompt(config, tiny_pack) is config


@pytest.mark.parametrize(
    ("data", "code", "reason"),
    [
        (b"", "invalid_prompt", "is empty"),
        (b"\n", "invalid_prompt", "is empty"),
        (b"good \xff", "invalid_prompt", "byte 5 is not UTF-8"),
        (b"x" * (256 * 256 + 1), "prompt_too_long", "larger than 65,536 bytes; this model's context holds 256 tokens"),
    ],
)
def test_invalid_prompt_files(tiny_pack: Path, tmp_path: Path, data: bytes, code: str, reason: str) -> None:
    with pytest.raises(InputError) as raised:
        read(tiny_pack, tmp_path / "prompt.txt", data)
    assert raised.value.code == code
    assert str(raised.value) == f"prompt_file={tmp_path / 'prompt.txt'}: {reason}" or reason in str(raised.value)


def test_endless_and_missing_files(tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, code in (
        (tmp_path / "none", "invalid_prompt"),
        (tmp_path, "invalid_prompt"),
        ("/dev/zero", "prompt_too_long"),
    ):
        with pytest.raises(InputError) as raised:
            with_prompt(generate.Config(prompt_file=str(path)), tiny_pack)
        assert raised.value.code == code
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InputError, match="stdin is closed"):
        with_prompt(generate.Config(prompt="-"), tiny_pack)


def test_every_task_with_a_prompt_takes_a_file(
    tiny_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "[v2] prompt.txt"
    path.write_text(f"{LINE}\n")
    common = [f"model.path={tiny_pack}", "raw=true"]

    def done(name: str, *arguments: str) -> Any:
        folder = tmp_path / name
        assert run([*common, *arguments, f"hydra.run.dir={folder}"]) == 0
        return folder

    short = "max_tokens=4"
    typed = json.loads((done("typed", f"prompt={LINE}", short) / "metrics.json").read_text())
    filed = json.loads((done("filed", f"prompt_file={path}", short) / "metrics.json").read_text())
    assert filed["token_ids"] == typed["token_ids"]
    assert filed["prefill"]["tokens"] == typed["prefill"]["tokens"]
    monkeypatch.setattr("sys.stdin", Stdin(LINE.encode()))
    piped = json.loads((done("piped", "prompt=-", short) / "metrics.json").read_text())
    assert piped["token_ids"] == typed["token_ids"]
    trace = RoutingTrace.load(done("trace", "task=trace", f"prompt_file={path}", short) / "routing.moetrace")
    assert trace.prompt_xxh3 == prompt_hash(Tokenizer.load(tiny_pack).encode(LINE))
    bench = done(
        "bench", "task=bench", f"prompt_file={path}", "tokens=1", "rounds=1", "plot=false", "conditions=[warm]"
    )
    assert json.loads((bench / "bench.json").read_text())["passes"][0]["prompt"] == LINE
    assert "prefill only" in capsys.readouterr().err
    assert run([*common, f"prompt_file={path}.none", f"hydra.run.dir={tmp_path / 'none'}"]) == 2
    assert json.loads((tmp_path / "none" / "failure.json").read_text())["code"] == "invalid_prompt"


class Endless(io.RawIOBase):
    """Endless stream that counts the bytes read from it."""

    def __init__(self) -> None:
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.count += len(buffer)
        return len(buffer)


def test_endless_stdin(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = Endless()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(endless)))
    for _ in range(2):
        with pytest.raises(InputError) as raised:
            with_prompt(generate.Config(prompt="-"), tiny_pack)
        assert raised.value.code == "prompt_too_long"
    assert endless.count < 2**18
