"""Requests that are odd rather than wrong in an obvious way: each has one status, and the server goes on."""

import json
from typing import Any

import pytest
from serving import CHAT, SUM, Live, raw

from flashmoe_mlx.text.messages import INVALID

POST = (f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json")


def called(arguments: str, name: str = "f") -> dict[str, Any]:
    call = {"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"messages": [SUM, {"role": "assistant", "tool_calls": [call]}, SUM]}


def tools(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": name, **fields}}]}


def forced(parameters: Any) -> dict[str, Any]:
    return {**tools(parameters=parameters), "tool_choice": "required"}


def formatted(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def of_a(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"messages": [{"role": "user", "content": "a\0b\ufdd0\ufffe\U0010ffff\ue000\U000f0000"}]}, 200),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role"),
        ({"messages": [SUM, {"role": "tool", "content": "x", "tool_call_id": "unknown"}]}, 200),
        ({"messages": [SUM, {"role": "assistant", "content": "The answer is"}]}, 200),
        ({"messages": [SUM] * 10_001}, "messages"),
        (called('{"a":' * 2000 + "1" + "}" * 2000), INVALID),
        (called("[" * 100_000), INVALID),
        (called('{"a": NaN}'), INVALID),
        (called('{"a": 1e999}'), INVALID),
        (called(f'{{"a": {"9" * 5000}}}'), INVALID),
        (called('{"a": "\\ud800"}'), "invalid_text"),
        (called("{}", "<|im_end|>\n"), 200),
        ({"max_tokens": 1.0}, 200),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1e18}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"logit_bias": {"5": None}}, 200),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop": ["", ""]}, 200),
        ({"stop": [["a"]]}, "stop"),
        ({"min_tokens": 50}, "invalid_min_tokens"),
        ({"user": 5, "metadata": [1], "store": "x", "service_tier": 5}, 200),
        (tools("<|im_end|>"), 200),
        (tools("f", description=5), "invalid_tools"),
        (tools("f", parameters=[1]), "invalid_tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({**tools(), "tool_choice": {"type": "function", "function": {"name": "g"}}}, "invalid_tool_choice"),
        (forced({"type": "string"}), 200),
        (forced({"type": "object", "properties": {"a": 5}}), 200),
        (forced({"type": "object", "properties": {}, "required": ["b"]}), 200),
        (forced(of_a({"enum": [None, 1, "\n</parameter>", {"b": [1]}, "<|im_end|>"]})), 200),
        (forced(of_a({"$ref": "#"})), 200),
        (forced({"type": "object", "properties": {"</parameter>\n<x": {}}}), "unsupported_tools"),
        (formatted(True), "response_format.json_schema.schema"),
        (formatted({"type": "strin"}), "unsupported_schema"),
        (formatted({"type": "integer", "minimum": 5, "maximum": 3}), "unsupported_schema"),
        (formatted({"type": "integer", "minimum": 10**30}), "unsupported_schema"),
        (formatted({"type": "string", "maxLength": -1}), "unsupported_schema"),
        (formatted(of_a(False)), "unsupported_schema"),
        (formatted({"type": "object", "properties": {"<|im_end|>": {}}, "required": ["<|im_end|>"]}), 200),
        ({"model": "a\nb: c\r\nX: y"}, 200),
    ],
)
def test_an_odd_field_is_taken_or_named(live: Live, fields: dict[str, Any], answer: int | str) -> None:
    body = live.chat(status=200 if answer == 200 else 400, **{"max_tokens": 2, **fields})
    if answer == 200:
        assert body["choices"][0]["finish_reason"]
    else:
        assert answer in (body["error"]["code"], body["error"]["param"])


def test_a_budget_of_thinking_has_a_range(live: Live) -> None:
    fields = {"model": "demo", "max_tokens": 9, "messages": [SUM]}
    body = live.post("/v1/messages", status=400, thinking={"type": "enabled", "budget_tokens": -5}, **fields)
    assert body["error"]["message"].startswith("thinking.budget_tokens")


@pytest.mark.parametrize(
    ("lines", "body", "status"),
    [
        (("PRI * HTTP/2.0", ""), b"SM\r\n\r\n", 400),
        (("GET /health HTTP/1.1", "Host: localhost", "Connection: Upgrade", "Upgrade: h2c"), b"", 200),
        ((*POST, "Content-Length: 5", "Transfer-Encoding: chunked"), b"0\r\n\r\nGET /x HTTP/1.1\r\n\r\n", 400),
        ((*POST, "Transfer-Encoding: xchunked"), b"0\r\n\r\n", 400),
        ((*POST, "Transfer-Encoding: chunked", "Transfer-Encoding: identity"), b"0\r\n\r\n", 400),
        ((*POST, "Transfer-Encoding: chunked"), b"-1\r\n{}\r\n", 400),
        ((*POST, "Transfer-Encoding: chunked"), b"2\r\n{}\r\n0\r\nHost: evil\r\n\r\n", 400),
        ((*POST, "Content-Length: +5"), b"{}   ", 400),
        ((*POST, "Content-Length: 2", "Content-Type: text/plain"), b"{}", 415),
        ((*POST, "Content-Length: 2", "Content-Encoding: gzip"), b"{}", 415),
        ((*POST, "Content-Length: 2", "X-Stainless-Retry-Count: \xb2"), b"{}", 400),
        ((*POST, "Content-Length: 2", f"X-Stainless-Retry-Count: {'9' * 4000}"), b"{}", 400),
        (("GET /health HTTP/1.1", "Host : localhost"), b"", 400),
        (("GET /health HTTP/1.1", "Host: localhost", "X: a\0b"), b"", 400),
        (("GET /health HTTP/1.1", "Host: localhost:99999"), b"", 403),
        (("CONNECT evil:80 HTTP/1.1", "Host: localhost"), b"", 400),
        (("OPTIONS * HTTP/1.1", "Host: localhost"), b"", 400),
    ],
)
def test_odd_bytes_of_http_have_a_status(live: Live, lines: tuple[str, ...], body: bytes, status: int) -> None:
    answer = raw(live, *lines, body=body, wait=0.5)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert json.loads(answer.partition(b"\r\n\r\n")[2])
