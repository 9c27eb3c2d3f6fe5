"""Limits of what a request may cost: schemas, expressions, lengths, memory, numbers that are no numbers."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import mlx.core as mx
import pytest
from serving import CHAT, SUM, Live

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.server.errors import ApiError
from flashmoe_mlx.server.fields import parse_body
from flashmoe_mlx.server.middleware import Policy
from flashmoe_mlx.stores import memory
from flashmoe_mlx.tasks import serve as task
from flashmoe_mlx.tasks.shared.keys import ServerConfig


@contextmanager
def responsive(live: Live, most: float = 2.0) -> Iterator[None]:
    """Check that /health answers within ``most`` seconds all the time."""
    slowest, done = [0.0], threading.Event()

    def ask() -> None:
        with httpx2.Client(base_url=live.url) as client:
            while not done.is_set():
                start = time.monotonic()
                assert client.get("/health").status_code == 200
                slowest[0] = max(slowest[0], time.monotonic() - start)
                time.sleep(0.005)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert slowest[0] < most


def of_schema(schema: Any) -> dict[str, Any]:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return {"response_format": asked, "max_tokens": 2}


def doubled(keyword: str, depth: int) -> dict[str, Any]:
    """Return a schema of few characters whose expansion has 2 to the power of ``depth`` parts."""
    parts = {str(n): {keyword: [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(depth)}
    return {"$defs": {**parts, str(depth): {"type": "string"}}, "$ref": "#/$defs/0"}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    ("schema", "status"),
    [
        (doubled("allOf", 40), 200),
        (doubled("anyOf", 28), 200),
        (nested(40), 400),
        ({"$ref": "#"}, 400),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, 400),
        ({"enum": [f"{n:05d}" for n in range(6000)]}, 200),
        ({"enum": [f"{n:06d}" for n in range(60_000)]}, 400),
        ({"type": "string", "minLength": 10**9}, 200),
        ({"type": "array", "items": {"type": "string"}, "minItems": 10**9}, 200),
        ({"type": "number", "multipleOf": 1e-300}, 400),
        ({"type": "number", "multipleOf": True}, 400),
        ({"type": "integer", "multipleOf": 9_999_991}, 400),
        ({"allOf": [{"type": "integer", "multipleOf": 97 + 2 * n} for n in range(4)]}, 400),
        ({"type": "array", "items": {"type": "number", "multipleOf": 0.25}}, 200),
        ({"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(700)}}, 200),
        ({"type": "string", "pattern": ".{100000}"}, 200),
        ({"type": "string", "pattern": "^(a+)+$"}, 200),
        ({"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"}, 200),
        ({"type": "string", "pattern": "((((a{1,100}){1,100}){1,100}){1,100})"}, 200),
        ({"type": "string", "pattern": "(" * 5000 + "a" + ")" * 5000}, 400),
        ({"type": "string", "pattern": r"(?=a)\1"}, 400),
        ({"type": "string", "pattern": "["}, 400),
        ({"$ref": "file:///etc/passwd"}, 400),
    ],
)
def test_schema_and_expression_bombs(live: Live, schema: Any, status: int) -> None:
    """Each is answered within seconds, and others are served meanwhile."""
    start = time.monotonic()
    with responsive(live):
        answer = live.client.post(CHAT, json={"model": "demo", "messages": [SUM], **of_schema(schema)})
    assert answer.status_code == status, answer.text
    assert status == 200 or answer.json()["error"]["code"] in ("unsupported_schema", "schema_too_large")
    assert time.monotonic() - start < 10


def test_tools_with_expensive_schemas(live: Live) -> None:
    parameters = {"type": "object", "properties": {f"p{n}": doubled("anyOf", 20) for n in range(6)}}
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": parameters}} for n in range(4)]
    with responsive(live):
        live.chat(status=400, tools=tools, tool_choice="required", max_tokens=2)  # more tokens than the context holds
    assert live.chat(max_tokens=1)["choices"]


def test_compiled_grammars_are_not_kept(live: Live) -> None:
    """There is no cache of grammars that clients could fill, in memory or on disk."""
    engine = live.service.worker.engine
    assert engine is not None
    live.chat(**of_schema({"type": "string", "pattern": "warm up"}))
    before = {name: id(value) for name, value in vars(engine._grammars).items()}
    for n in range(20):
        live.chat(**of_schema({"type": "string", "pattern": f"[a-z]{{{n + 1}}}"}))
    assert {name: id(value) for name, value in vars(engine._grammars).items()} == before


@pytest.mark.parametrize("character", ["a", "hello you ", "<|im_end|>", "👩‍👩‍👧‍👦"])
@pytest.mark.sampled(2)
def test_a_text_far_beyond_the_context_is_refused_at_once(live: Live, character: str) -> None:
    text = character * (8_000_000 // len(character))
    start = time.monotonic()
    with responsive(live):
        assert live.chat({"role": "user", "content": text}, status=400)["error"]["code"] == "context_length_exceeded"
        live.post("/v1/completions", model="demo", prompt=text, status=400)
        fields = {"model": "demo", "max_tokens": 1, "messages": [{"role": "user", "content": text}]}
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            message = live.post(path, status=400, **fields)["error"]["message"]
            assert message.startswith("prompt is too long: ")
            assert message.endswith(" tokens > 4096 maximum")
        assert live.post("/tokenize", status=400, prompt=text)["error"]["param"] == "prompt"
    assert time.monotonic() - start < 10


def test_a_count_beyond_the_context_is_exact(live: Live) -> None:
    fields = {"model": "demo", "messages": [{"role": "user", "content": "apple " * 20_000}]}
    count = live.post("/v1/messages/count_tokens", **fields)["input_tokens"]
    assert count > 20_000
    message = live.post("/v1/messages", status=400, max_tokens=1, **fields)["error"]["message"]
    assert message == f"prompt is too long: {count} tokens > 4096 maximum"


def test_the_context_fills_during_an_answer(live: Live) -> None:
    ends = {"2041": -100, "2039": -100}
    answer = live.post("/v1/completions", model="demo", prompt=[5] * 4090, max_tokens=100, logit_bias=ends)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] in (4096, 4097)  # the last token needs no place


def test_a_prompt_without_memory_is_refused_with_the_numbers(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    for path, prompt in ((CHAT, {"messages": [SUM]}), ("/v1/completions", {"prompt": "a"})):
        answer = live.client.post(path, json={"model": "demo", **prompt})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_enough_memory")
        assert "GiB are free" in answer.json()["error"]["message"]
        assert answer.headers["x-should-retry"] == "false"
    monkeypatch.undo()
    assert live.chat(max_tokens=1)["choices"]


def test_logits_that_are_no_numbers_end_one_answer(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = live.service.worker.engine
    assert engine is not None
    size = engine.model.config.vocab_size
    monkeypatch.setattr(type(engine.model), "logits", lambda _, hidden: mx.full((len(hidden), size), float("nan")))
    error = live.chat(status=500)["error"]
    assert error["code"] == "bad_logits"
    monkeypatch.undo()
    assert live.chat()["choices"][0]["message"]["content"] == "17 plus 25 is 42."


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 5e-324},
        {"temperature": 2, "top_p": 5e-324},
        {"min_p": 1, "temperature": 2},
        {"repetition_penalty": 10, "frequency_penalty": 2, "presence_penalty": -2},
        {"logit_bias": {str(n): -100 for n in range(1000)}},
        {"logit_bias": {"5": 100, "6": 100}},
        {"seed": -1},
        {"seed": 2**64 - 1},
        {"top_k": 10**9},
    ],
)
def test_extreme_numbers_in_range_are_served(live: Live, fields: dict[str, Any]) -> None:
    answer = live.chat(max_tokens=3, logprobs=True, top_logprobs=2, **fields)
    assert "NaN" not in json.dumps(answer)
    assert "Infinity" not in json.dumps(answer)


@pytest.mark.parametrize("token", ["\uff15", "+5", "05", " 5", "1_000", "5.0", "-1", "", "9" * 30, "99999"])
def test_token_ids_are_plain_numbers(live: Live, token: str) -> None:
    assert live.chat(status=400, logit_bias={token: 1})["error"]["code"]


@pytest.mark.parametrize("ids", [[True], [1.5], [10**20], [-1], ["5"], [[5]], {"5": 1}, [99_999]])
def test_stop_tokens_are_token_ids(live: Live, ids: Any) -> None:
    assert live.chat(status=400, stop_token_ids=ids)["error"]["code"]


@pytest.mark.parametrize("prompt", [[True], [1.5], [10**20], [-1], [99_999], [[5], []], [], "", [[]], {"a": 1}, [None]])
def test_prompts_are_text_or_token_ids(live: Live, prompt: Any) -> None:
    assert live.post("/v1/completions", status=400, model="demo", prompt=prompt, max_tokens=1)["error"]["code"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', 400),
        (b'{"a": {"b": 1, "b": 1}}', 400),
        (b'{"a": [' + b"0," * 2**21 + b"0]}", 413),
        (b"[" * 2**22, 413),
        (b'{"a": [' + b"[]," * 2**18 + b"0]}", 413),
    ],
)
def test_bodies_with_equal_keys_or_too_many_values(body: bytes, status: int) -> None:
    with pytest.raises(ApiError) as refused:
        parse_body(body)
    assert refused.value.status == status


def test_a_body_of_many_values_leaves_the_server_responsive(live: Live) -> None:
    body = json.dumps({"model": "demo", "messages": [SUM], "max_tokens": 1, "x": [[]] * 2**17 + ["a"] * 2**19})
    with responsive(live):
        answer = live.client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1),
        ("port", 65_536),
        ("port", 99_999),
        ("queue", 0),
        ("queue", -5),
        ("queue", 10**9),
        ("together", 0),
        ("together", 10**9),
        ("stop_seconds", -1.0),
        ("stop_seconds", float("nan")),
        ("stop_seconds", float("inf")),
    ],
)
def test_numbers_of_the_command_line_have_ranges(name: str, value: float) -> None:
    options = ServerConfig()
    setattr(options, name, value)
    with pytest.raises(InputError, match=rf"^server\.{name}=") as refused:
        task._check_ranges(options)
    assert refused.value.code == "out_of_range"


@pytest.mark.parametrize("name", ["https://a.example", "a.example:80", "a b", "*", "", "a/b", "user@a.example"])
def test_names_of_the_server_are_host_names(name: str) -> None:
    with pytest.raises(InputError, match=r"^server\.names"):
        Policy(names=(name,))


@pytest.mark.parametrize(
    "origin", ["*", "null", "a.example", "https://a.example/chat", "ftp://a.example", "https://*.a"]
)
def test_origins_are_origins(origin: str) -> None:
    with pytest.raises(InputError, match=r"^server\.origins"):
        Policy(origins=(origin,))
