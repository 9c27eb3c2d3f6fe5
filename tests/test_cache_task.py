"""task=cache: list, clear and warm a folder of conversations; other tasks continue from it."""

import json
from pathlib import Path

import pytest

from flashmoe_mlx import load
from flashmoe_mlx.cli.application import run as run_command_line

SYSTEM = {"role": "system", "content": "You answer briefly, with numbers where a number suffices."}


def cache(tmp_path: Path, *arguments: str) -> int:
    run_dir = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
    return run_command_line(["task=cache", f"cache_dir={tmp_path / 'kept'}", f"hydra.run.dir={run_dir}", *arguments])


def test_a_warm_prompt_is_listed_continued_and_cleared(
    demo_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"messages": [SYSTEM, {"role": "user", "content": "Hello"}]}))
    assert cache(tmp_path, "warm", f"prompt={request}") == 0
    capsys.readouterr()
    assert cache(tmp_path, "list") == 0
    assert "demo_model" in capsys.readouterr().err

    question = ["task=generate", "prompt=What is 2 plus 3?", f"system={SYSTEM['content']}", "max_tokens=2"]
    run_dir = tmp_path / "answer"
    assert run_command_line([*question, f"cache_dir={tmp_path / 'kept'}", f"hydra.run.dir={run_dir}"]) == 0
    prompt = json.loads((run_dir / "metrics.json").read_text())["prompt"]
    assert prompt["reused_from"] == "disk"
    assert prompt["reused"] > 10

    with load(demo_pack, cache_dir=tmp_path / "kept"):
        assert cache(tmp_path, "clear") == 1  # this process writes there
    assert cache(tmp_path, "clear") == 0
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cache_dir=null",), "needs cache_dir"),
        (("warm",), "needs prompt=<file>"),
        (("warm", "prompt=nosuch.txt"), "no such file"),
        (("action=empty",), "choose list, clear or warm"),
        (("empty",), "expected key=value"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    assert cache(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_folder_with_other_files_keeps_them(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    (kept / "mine").mkdir(parents=True)
    (kept / "mine" / "settings.json").write_text("{}")
    assert cache(tmp_path, "clear") == 0
    assert (kept / "mine" / "settings.json").exists()
