"""Every task runs with a model of every native family, as a user starts it, and with one of mlx-lm (``-m oracle``)."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from conftest import TINY
from serving import serve

from flashmoe_mlx.cli.application import run as run_command_line
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.made_models.byte_tokenizer import write_byte_tokenizer
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.models.registry import families
from flashmoe_mlx.pack.opening import open_pack

SIZES = replace(TINY, num_layers=4, num_experts=8, max_context=4096)


def try_every_task(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, bits: int | None) -> None:
    """Run every task with the model in ``model``; write to ``folder``, and add a variant of ``bits`` bits."""

    def run(task: str, *arguments: str) -> None:
        of_model = () if task == "pack" else (f"model.path={model}",)
        assert run_command_line([f"task={task}", *of_model, *arguments, f"hydra.run.dir={folder / task}"]) == 0

    (folder / "requests.jsonl").write_text('{"id": "a", "prompt": "Hi"}\n{"id": "b", "prompt": "Hello"}\n')
    item = {"kind": "text", "id": "t", "text": "One two three four."}
    (folder / "items.jsonl").write_text(json.dumps(item) + "\n")
    run("generate", "prompt=Hi", "max_tokens=2")
    run("trace", "prompt=Hi", "max_tokens=2")
    assert len(RoutingTrace.load(folder / "trace" / "routing.moetrace").experts) > 2
    run("batch", f"input={folder / 'requests.jsonl'}", f"out={folder / 'answers.jsonl'}", "max_tokens=2")
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 2
    run("bench", "tokens=1", "rounds=1", "conditions=[warm]", "plot=false", "backends=[pread,mmap]")
    run("estimate", "probe=false")
    assert json.loads((folder / "estimate" / "estimate.json").read_text())["expert_bytes"] > 0
    run("evaluate", "limit=1", "kinds=[text]", "answers=false")
    monkeypatch.setattr("sys.stdin", StringIO("Hi\n"))
    run("chat", "max_tokens=2")
    with serve(model) as running:
        question = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}
        first, again = (running.post(model="tiny", **question) for _ in range(2))
        assert first["usage"]["completion_tokens"] == 2
        assert again["choices"] == first["choices"], "with and without the states of an earlier prompt"
    if bits is not None:
        run("pack", f"source={model}", f"bits=[{bits}]")
        assert f"q{bits}" in open_pack(model).experts


@pytest.mark.nightly
@pytest.mark.parametrize("family", [family.model_types[-1] for family in families()])
def test_every_task_runs_with_every_native_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = synthetic_pack("tiny", SIZES, tmp_path / "cache", family=family)
    try_every_task(pack.folder, tmp_path, monkeypatch, bits=2)


@pytest.mark.oracle
def test_every_task_runs_with_a_model_of_mlx_lm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx_lm.utils", reason="needs the oracle extra", exc_type=ImportError)
    from oracle.mlx_lm_models import write_checkpoint

    checkpoint, pack = tmp_path / "checkpoint", tmp_path / "model"
    write_checkpoint("olmoe", checkpoint, vocab_size=512, max_position_embeddings=4096)
    write_byte_tokenizer(checkpoint)
    arguments = (f"source={checkpoint}", f"out={pack}", f"hydra.run.dir={tmp_path / 'packing'}")
    assert run_command_line(["task=pack", *arguments]) == 0
    try_every_task(pack, tmp_path, monkeypatch, bits=None)
