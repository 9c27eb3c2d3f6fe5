"""``/v1/chat/completions``: fields, streams, tools, thinking."""

import json
from typing import Any

import pytest
from serving import CHAT, SUM, Live

BUY = {
    "type": "function",
    "function": {
        "name": "buy",
        "description": "Buy goods on the market",
        "parameters": {
            "type": "object",
            "properties": {"product": {"type": "string"}, "amount": {"type": "integer"}},
            "required": ["product", "amount"],
        },
        "strict": True,
    },
}
ASK = {"role": "user", "content": "Please order cider, 6 pieces."}


def content(body: dict[str, Any]) -> str:
    text: str = body["choices"][0]["message"]["content"]
    return text


def test_an_answer_has_the_form_of_the_api(live: Live) -> None:
    body = live.chat()
    (choice,) = body["choices"]
    assert body["object"] == "chat.completion"
    assert choice["finish_reason"] == "stop"
    assert choice["message"] == {
        "role": "assistant",
        "content": "17 plus 25 is 42.",
        "refusal": None,
        "annotations": [],
    }
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]


def test_a_stream_equals_the_whole_answer(live: Live) -> None:
    events = live.stream(messages=[SUM], stream_options={"include_usage": True})
    assert events[-1] == "[DONE]"
    first, *middle, last, usage = events[:-1]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == content(live.chat())
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == live.chat()["usage"]["completion_tokens"]
    assert all("usage" not in chunk for chunk in events[:-2])
    assert len({chunk["id"] for chunk in events[:-1]}) == 1


def test_requests_of_open_webui(live: Live) -> None:
    """Open WebUI lists the models, streams an answer, and asks for a title without a stream."""
    headers = {"Authorization": "Bearer x", "X-OpenWebUI-User-Name": "Ada", "X-OpenWebUI-Chat-Id": "1"}
    model = live.client.get("/v1/models", headers=headers).json()["data"][0]
    asked = {"model": model["id"], "stream": True, "stream_options": {"include_usage": True}, "messages": [SUM]}
    with live.client.stream("POST", CHAT, json=asked, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"
    task = {"role": "user", "content": '### Task:\nGenerate a concise title. JSON format: { "title": "..." }'}
    assert content(live.post(headers=headers, model=model["id"], stream=False, max_tokens=1000, messages=[task]))


def test_calls_are_streamed_in_parts_that_clients_can_join(live: Live) -> None:
    whole = live.chat(ASK, tools=[BUY])["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    (call,) = whole["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"product": "cider", "amount": 6}
    deltas = [
        chunk["choices"][0]["delta"]["tool_calls"][0]
        for chunk in live.stream(messages=[ASK], tools=[BUY])[:-1]
        if "tool_calls" in chunk["choices"][0]["delta"]
    ]
    assert deltas[0] == {
        "index": 0,
        "id": deltas[0]["id"],
        "type": "function",
        "function": {"name": "buy", "arguments": ""},
    }
    assert all(delta.keys() == {"index", "function"} and delta["index"] == 0 for delta in deltas[1:])
    assert all(delta["function"].keys() == {"arguments"} for delta in deltas[1:])
    assert "".join(delta["function"]["arguments"] for delta in deltas) == call["function"]["arguments"]
    assert call["id"] != deltas[0]["id"]


def test_a_result_of_a_tool_is_answered(live: Live) -> None:
    call = live.chat(ASK, tools=[BUY])["choices"][0]["message"]
    result = {
        "role": "tool",
        "tool_call_id": call["tool_calls"][0]["id"],
        "content": [{"type": "text", "text": '{"paid": 12}'}],
    }
    assert content(live.chat(ASK, call, result, tools=[BUY])) == "I bought 6 pieces of cider for 12 coins."


def test_thinking_is_a_field_apart(live: Live) -> None:
    options = {"chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 200}
    message = live.chat(**options)["choices"][0]["message"]
    assert message["reasoning_content"]
    assert "<think>" not in message["reasoning_content"] + message["content"]
    chunks = live.stream(messages=[SUM], **options)[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]
    assert "reasoning_content" not in live.chat(reasoning_effort="none")["choices"][0]["message"]


def test_tokens_of_log_probabilities_make_up_the_content(live: Live) -> None:
    choice = live.chat(logprobs=True, top_logprobs=3)["choices"][0]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 3 and entry["logprob"] <= 0 for entry in entries)
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in entries)
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == choice["message"]["content"]


def test_system_messages_and_developers_are_merged_in_place(live: Live) -> None:
    rule = {"role": "developer", "content": "Answer briefly."}
    first = live.post("/apply-template", model="demo", messages=[rule, {"role": "system", "content": "Be kind."}, SUM])
    assert first["prompt"].startswith("<|im_start|>system\nAnswer briefly.\n\nBe kind.<|im_end|>")
    late = live.post("/apply-template", model="demo", messages=[SUM, rule])
    assert "What is 17 plus 25?\n\nAnswer briefly.<|im_end|>" in late["prompt"]
    assert content(live.chat(SUM, {"role": "assistant", "content": "42"}, rule, SUM)) == "17 plus 25 is 42."


def test_max_tokens_beyond_the_context_are_no_error(live: Live) -> None:
    assert live.chat(max_tokens=128000, max_completion_tokens=10**9)["choices"][0]["finish_reason"] == "stop"
    short = live.chat(max_tokens=500, max_completion_tokens=3)
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 3


def test_a_stop_string_ends_the_answer(live: Live) -> None:
    assert content(live.chat(stop=[" is", ""])) == "17 plus 25"


def test_equal_seeds_give_equal_answers(live: Live) -> None:
    question = {"role": "user", "content": "Tell me something about yourself."}
    drawn = [content(live.chat(question, temperature=1.5, seed=7, max_tokens=20)) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_unknown_fields_are_ignored(live: Live) -> None:
    extra = {"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "new_field": [1]}
    assert content(live.chat(**extra, model="any-name", stream=None, stop=None)) == "17 plus 25 is 42."


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"stop": 1}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"seed": 1.5}, "seed"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 70000}}]}, "tools[0]"),
    ],
)
def test_a_wrong_field_is_named(live: Live, fields: dict[str, Any], param: str) -> None:
    error = live.post(status=400, **{"model": "demo", "messages": [SUM], **fields})["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(param)


def test_a_prompt_beyond_the_context_is_refused_before_the_stream(live: Live) -> None:
    long = {"role": "user", "content": "apple " * 5000}
    for stream in (False, True):
        error = live.chat(long, status=400, stream=stream)["error"]
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "buy"}}])
def test_a_call_can_be_demanded(live: Live, choice: Any) -> None:
    answer = live.chat(SUM, tools=[BUY], tool_choice=choice, max_tokens=100)["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    assert {call["function"]["name"] for call in answer["message"]["tool_calls"]} == {"buy"}
    single = live.chat(SUM, tools=[BUY], tool_choice=choice, parallel_tool_calls=False)["choices"][0]
    assert len(single["message"]["tool_calls"]) == 1


def test_tools_can_be_left_out(live: Live) -> None:
    """``allowed_tools`` keeps a conversation's tools the same while a single answer may use a part of them."""
    other = {"type": "function", "function": {"name": "sell", "parameters": {"type": "object", "properties": {}}}}
    named = {"type": "function", "function": {"name": "buy"}}
    for mode, tools, expected in (("required", [named], {"buy"}), ("auto", [], set())):
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
        message = live.chat(ASK, tools=[other, BUY], tool_choice=choice, max_tokens=100)["choices"][0]["message"]
        assert {call["function"]["name"] for call in message.get("tool_calls", [])} == expected


def test_calls_can_be_forbidden(live: Live) -> None:
    message = live.chat(ASK, tools=[BUY], tool_choice="none", max_tokens=30)["choices"][0]["message"]
    assert "tool_calls" not in message


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "boat": {"type": "boolean"}, "coins": {"type": "integer"}},
    "required": ["name", "boat", "coins"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}},
        {"type": "json_object", "schema": SCHEMA},
    ],
)
def test_answers_follow_a_schema(live: Live, asked: dict[str, Any], thinking: bool) -> None:
    question = {"role": "user", "content": "Mabel has no boat. There are 6 coins in Mabel's bag. Write JSON."}
    options = {"chat_template_kwargs": {"enable_thinking": thinking}, "max_tokens": 400}
    answer = live.chat(question, response_format=asked, **options)["choices"][0]
    if answer["finish_reason"] == "stop":
        assert [*json.loads(answer["message"]["content"])] == ["name", "boat", "coins"]
    assert answer["finish_reason"] == "stop" or thinking


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "xml"}},
        {"response_format": {"schema": {}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://a/b"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}}},
        {"tool_choice": "required"},
        {"tool_choice": "any", "tools": [BUY]},
        {"tool_choice": {"type": "function", "function": {"name": "sell"}}, "tools": [BUY]},
        {"logit_bias": {"5": 1000}},
        {"logit_bias": {"x": 1}},
        {"stop_token_ids": ["x"]},
    ],
)
def test_constraints_that_cannot_be_kept_are_refused(live: Live, fields: dict[str, Any]) -> None:
    for stream in (False, True):
        assert live.chat(status=400, stream=stream, **fields)["error"]["message"]
