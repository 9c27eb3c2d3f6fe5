"""task=batch: files of requests, their answers, and the continuation of an interrupted run."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_oracle import assert_one_line

from flashmoe_mlx import load
from flashmoe_mlx.cli.application import run as run_command_line
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.batch_file import AnswerFile, read_batch

PROMPTS = ("What is 2 plus 3?", "What is 17 plus 25?", "Hello", "What is 9 plus 9?", "Who are you?")


def openai_line(key: str, prompt: str, **options: Any) -> dict[str, Any]:
    body = {"model": "any", "messages": [{"role": "user", "content": prompt}], **options}
    return {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write_lines(path: Path, lines: list[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    return {answer.get("custom_id", answer["id"]): answer for answer in answers}


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """Five requests in both forms, and one that the template refuses."""
    plain = [{"prompt": prompt, "id": prompt, "max_tokens": 8} for prompt in PROMPTS[:2]]
    openai = [openai_line(prompt, prompt, max_completion_tokens=8, n=1, stream=False) for prompt in PROMPTS[2:]]
    return write_lines(tmp_path / "in.jsonl", [*plain, *openai, {"messages": [{"role": "x", "content": "y"}]}])


def batch(requests: Path, out: Path, *arguments: str) -> int:
    run_dir = out.parent / f"run-{len(list(out.parent.glob('run-*')))}"
    line = ["task=batch", f"input={requests}", f"out={out}", "temperature=0", f"hydra.run.dir={run_dir}"]
    return run_command_line([*line, *arguments])


def test_answers_equal_those_of_each_prompt_alone(requests: Path, tmp_path: Path, demo_pack: Path) -> None:
    """A failed request does not stop the other requests, and the exit code is 1."""
    out = tmp_path / "out.jsonl"
    assert batch(requests, out, "together=3") == 1
    answers = read_answers(out)
    assert answers["6"]["error"]["code"] == "template_refused"
    with load(demo_pack) as engine:
        for prompt in PROMPTS:
            pieces = list(engine.generate(prompt, max_tokens=8, temperature=0))
            text, answer = "".join(piece.text for piece in pieces), answers[prompt]
            if prompt in PROMPTS[:2]:
                assert (answer["text"], answer["finish_reason"]) == (text, pieces[-1].finish_reason)
                assert answer["prompt_tokens"] == len(engine.encode(prompt))
                continue
            body = answer["response"]["body"]
            assert body["choices"][0]["message"]["content"] == text
            assert body["choices"][0]["finish_reason"] == pieces[-1].finish_reason
            assert body["usage"]["completion_tokens"] == sum(len(piece.token_ids) for piece in pieces)
            assert (answer["response"]["status_code"], answer["error"]) == (200, None)
    (record,) = tmp_path.glob("run-*/batch.json")
    found = json.loads(record.read_text())
    assert (found["answered"], found["failed"], found["together"]) == (5, 1, 3)


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
BODY = {"model": "any", "messages": [{"role": "user", "content": "What is 2 plus 3?"}]}
TOOL = {"name": "lamp", "parameters": {"properties": {"on": {"type": "boolean"}}, "required": ["on"]}}


def test_lines_with_the_options_of_clients(tmp_path: Path, demo_pack: Path) -> None:
    """Each answer is that of the chat API; a line with a fault gets an error that names the field."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    tools = [{"type": "function", "function": TOOL}]
    lines: dict[str, dict[str, Any]] = {
        "schema": {"response_format": form},
        "tools": {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False},
        "named": {"tools": tools, "tool_choice": {"type": "function", "function": {"name": "lamp"}}},
        "logprobs": {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 3},
        "stop": {"stop": [" is"], "user": "me", "metadata": {"a": "b"}, "store": False},
        "n": {"n": 2, "temperature": 1, "seed": 5, "max_tokens": 4},
        "bias": {"logit_bias": {"5": 1}, "presence_penalty": 0.5, "service_tier": "auto", "stream": False},
        "bad n": {"n": 99},
        "bad format": {"response_format": {"type": "json_schema"}},
        "bad schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
        "bad choice": {"tools": tools, "tool_choice": {"type": "function", "function": {"name": "other"}}},
        "bad number": {"temperature": "hot"},
        "stream": {"stream": True},
        "image": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    }
    requests = write_lines(
        tmp_path / "in.jsonl",
        [openai_line(name, "What is 2 plus 3?") | {"body": {**BODY, **options}} for name, options in lines.items()],
    )
    out = tmp_path / "out.jsonl"
    assert batch(requests, out, "max_tokens=40", "thinking=false") == 1
    answers = read_answers(out)
    failed = {name: answer["error"] for name, answer in answers.items() if answer["error"]}
    assert set(failed) == {"bad n", "bad format", "bad schema", "bad choice", "bad number", "stream", "image"}
    for error in failed.values():
        assert "\n" not in error["message"]
    assert "temperature" in failed["bad number"]["message"]
    assert failed["bad schema"]["code"] == "unsupported_schema"
    bodies = {name: answer["response"]["body"] for name, answer in answers.items() if answer["response"]}
    choices = {name: body["choices"][0] for name, body in bodies.items()}
    jsonschema.validate(json.loads(choices["schema"]["message"]["content"]), SCHEMA)
    for name in ("tools", "named"):
        call = choices[name]["message"]["tool_calls"][0]["function"]
        assert call["name"] == "lamp"
        assert isinstance(json.loads(call["arguments"])["on"], bool)
    assert choices["tools"]["finish_reason"] == "tool_calls"
    entries = choices["logprobs"]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 3
    assert " is" not in choices["stop"]["message"]["content"]
    assert choices["stop"]["finish_reason"] == "stop"
    with load(demo_pack) as engine:
        for index, choice in enumerate(bodies["n"]["choices"]):
            options = {"temperature": 1, "seed": 5 + index, "max_tokens": 4, "enable_thinking": False}
            expected = "".join(piece.text for piece in engine.generate("What is 2 plus 3?", **options))
            assert (choice["index"], choice["message"]["content"]) == (index, expected)
    assert bodies["n"]["usage"]["completion_tokens"] == 8


def test_faulty_lines_do_not_stop_the_others(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "Hello", "id": "good", "max_tokens": 2})
    other = json.dumps(openai_line("url", "Hello") | {"url": "/v1/embeddings"})
    requests = tmp_path / "in.jsonl"
    requests.write_text("\n".join(['{"prompt": "a"', good, '{"prompt": 5, "id": "number"}', other]))
    assert batch(requests, tmp_path / "out.jsonl") == 1
    answers = read_answers(tmp_path / "out.jsonl")
    assert answers["good"]["finish_reason"] == "length"
    for key, line in (("1", 1), ("number", 3), ("url", 4)):
        assert answers[key]["error"]["code"] == "invalid_batch"
        assert f"in.jsonl:{line}: " in answers[key]["error"]["message"]
    assert answers["url"]["response"] is None


@pytest.mark.thorough
def test_killed_runs_are_continued(tmp_path: Path) -> None:
    """A run that SIGKILL ends again and again answers every request once, as an undisturbed run does."""
    lines = [{"prompt": f"What is {number} plus 3?", "id": str(number), "max_tokens": 20} for number in range(10)]
    requests, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "flashmoe_mlx", "task=batch", f"input={requests}", f"out={out}", "temperature=0"]
    for run in range(5):
        with subprocess.Popen([*command, f"hydra.run.dir={tmp_path / f'run{run}'}"]) as process:
            before = out.stat().st_size if out.exists() else 0
            while process.poll() is None and (not out.exists() or out.stat().st_size == before):
                time.sleep(0.01)
            process.kill()
        if len(read_complete(out)) == len(lines):
            break
    assert batch(requests, tmp_path / "whole.jsonl") == 0
    assert batch(requests, out) == 0
    assert read_answers(out) == read_answers(tmp_path / "whole.jsonl")
    assert len(out.read_bytes().splitlines()) == len(lines)


def test_batches_need_no_web_server() -> None:
    code = "import sys; sys.modules.update(starlette=None, uvicorn=None); import flashmoe_mlx.tasks.batch"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def read_complete(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def test_requests_from_standard_input(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "flashmoe_mlx", "task=batch", "input=-", f"out={tmp_path / 'out.jsonl'}"]
    line = json.dumps({"prompt": "Hello", "id": "a", "max_tokens": 2}).encode()
    subprocess.run([*run, f"hydra.run.dir={tmp_path / 'run'}"], input=line, check=True, timeout=120)
    assert list(read_answers(tmp_path / "out.jsonl")) == ["a"]


def test_an_interrupted_run_is_continued(requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete, out = tmp_path / "complete.jsonl", tmp_path / "out.jsonl"
    batch(requests, complete, "together=1")
    first, second = complete.read_bytes().splitlines(keepends=True)[:2]
    out.write_bytes(first + second[:-7])
    batch(requests, out, "together=1")
    assert "1 answer of an earlier run kept" in capsys.readouterr().err
    assert out.read_bytes().startswith(first)
    without_times = [
        {key: {**answer, "response": None} for key, answer in read_answers(path).items()} for path in (complete, out)
    ]
    assert without_times[0] == without_times[1]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"no json\n",
        b"[1]\n",
        b"\xff\n",
        b'{"prompt": "a", "messages": []}\n',
        b'{"id": "a"}\n',
        b'{"prompt": 5}\n',
        b'{"messages": "a"}\n',
        b'{"prompt": "a", "id": 5}\n',
        b'{"prompt": "a", "id": ""}\n',
        b'{"prompt": "a", "n": 2}\n',
        b'{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n',
        b'{"prompt": "a", "prompt": "b"}\n',
        b'{"prompt": "a", "stop": 5}\n',
        json.dumps(openai_line("a", "b") | {"body": {"messages": "a"}}).encode(),
        json.dumps(openai_line("a", "b") | {"url": "/v1/embeddings"}).encode(),
        json.dumps(openai_line("a", "b") | {"body": []}).encode(),
        json.dumps({"body": {"messages": []}, "url": "/v1/chat/completions"}).encode(),
    ],
)
def test_files_that_hold_no_requests_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_batch(path)
    assert caught.value.code == "invalid_batch"
    assert str(path) in str(caught.value)
    assert_one_line(caught.value)


@settings(deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_is_requests_or_an_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(InputError):
        assert read_batch(path)


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "a"}\n',
        b"text\n",
        b'{"id": "x", "prompt": "a"}\n',
        b"\xff\n",
        b"text",
        b'{"prompt": "a"}',
        b'{"id": "x", "prompt": "a"}',
    ],
)
def test_a_file_without_answers_is_not_appended_to(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        AnswerFile(path)
    assert caught.value.code == "invalid_batch"
    assert path.read_bytes() == content


def test_answers_of_another_file_are_not_mixed(requests: Path, tmp_path: Path) -> None:
    out = write_lines(tmp_path / "out.jsonl", [{"id": "unknown", "text": "a"}])
    assert batch(requests, out) == 2
    assert list(read_answers(out)) == ["unknown"]


def test_a_place_that_cannot_be_written_is_named(requests: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        AnswerFile(tmp_path / "no" / "out.jsonl")
    assert caught.value.code == "invalid_batch"
    assert batch(requests, tmp_path / "no" / "out.jsonl", f"hydra.run.dir={tmp_path / 'run'}") == 2
    assert run_command_line(["task=batch", f"hydra.run.dir={tmp_path / 'run2'}"]) == 2


def test_failed_requests_are_tried_again(requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert batch(requests, out) == 1
    answered = [line for line in out.read_bytes().splitlines() if b'"template_refused"' not in line]
    assert batch(requests, out) == 1
    assert out.read_bytes().splitlines()[:-1] == answered
    assert len(read_answers(out)) == 6
    write_lines(requests, [json.loads(line) for line in requests.read_text().splitlines()[:-1]])
    assert batch(requests, out) == 0
    assert out.read_bytes().splitlines() == answered
    assert batch(requests, out) == 0
    assert "5 answers of an earlier run kept" in capsys.readouterr().err


def test_an_option_that_no_request_can_have_ends_the_run(requests: Path, tmp_path: Path) -> None:
    assert batch(requests, tmp_path / "out.jsonl", "top_p=2") == 2
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_two_processes_cannot_write_one_file(tmp_path: Path) -> None:
    with contextlib.closing(AnswerFile(tmp_path / "out.jsonl")), pytest.raises(InputError, match="another process"):
        AnswerFile(tmp_path / "out.jsonl")


def test_devices_are_refused() -> None:
    with pytest.raises(InputError, match="regular file") as caught:
        AnswerFile(Path("/dev/full"))
    assert caught.value.code == "invalid_batch"


def test_an_id_that_utf_8_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with contextlib.closing(AnswerFile(path)) as answers:
        answers.write({"id": "\ud800", "text": "a"})
    with contextlib.closing(AnswerFile(path)) as answers:
        assert answers.done == {"\ud800"}


def test_a_symbolic_link_stays_when_lines_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.symlink_to("elsewhere.jsonl")
    kept = b'{"id": "a", "text": "b"}\n'
    (tmp_path / "elsewhere.jsonl").write_bytes(kept + b'{"id": "c')
    AnswerFile(path).close()
    assert path.is_symlink()
    assert path.read_bytes() == kept
