"""``/v1/messages`` and ``/v1/messages/count_tokens``: the forms of the Anthropic API."""

import json
from typing import Any

import pytest
from serving import SUM, Live, parse_events

from flashmoe_mlx.server.anthropic_messages import MessageStream
from flashmoe_mlx.server.errors import ApiError, error_body
from flashmoe_mlx.server.events import (
    CallArguments,
    CallEnded,
    CallStarted,
    Event,
    Failed,
    Finished,
    Reasoning,
    Started,
    Text,
    Usage,
)

PATH = "/v1/messages"
BUY = {
    "name": "buy",
    "description": "Buy goods on the market",
    "input_schema": {
        "type": "object",
        "properties": {"product": {"type": "string"}, "amount": {"type": "integer"}},
        "required": ["product", "amount"],
    },
    "cache_control": {"type": "ephemeral"},
}
ASK = {"role": "user", "content": "Please order cider, 6 pieces."}
USAGE = Usage(prompt=10, cached=4, completion=7, reasoning=2)


def ask(live: Live, *messages: dict[str, Any], status: int = 200, **fields: Any) -> dict[str, Any]:
    body = {"model": "demo", "max_tokens": 100, "temperature": 0, "messages": list(messages or (SUM,)), **fields}
    return live.post(PATH, status=status, **body)


def prompt(live: Live, **fields: Any) -> int:
    tokens: int = live.post(f"{PATH}/count_tokens?beta=true", model="demo", **fields)["input_tokens"]
    return tokens


def translated(*events: Event) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the data of the stream of ``events``, and the message that it adds up to."""
    stream = MessageStream("demo", 10)
    opening = stream.opening()  # before the message changes
    text = (opening + b"".join(map(stream.frames, events))).decode()
    named = list(parse_events(iter(text.splitlines())))
    assert all(name == data["type"] for name, data in named)
    return [data for _, data in named], stream.message


def test_an_answer_has_the_form_of_the_api(live: Live) -> None:
    body = ask(live, system=[{"type": "text", "text": "Answer briefly."}])
    assert body["type"] == "message"
    assert body["role"] == "assistant"
    assert body["content"] == [{"type": "text", "text": "17 plus 25 is 42.", "citations": None}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    assert ask(live)["id"] != body["id"]
    again = ask(live, system="Answer briefly.")["usage"]
    assert again["cache_read_input_tokens"] > 0
    total = prompt(live, system="Answer briefly.", messages=[SUM])
    assert again["input_tokens"] + again["cache_read_input_tokens"] == total


def test_a_stream_names_its_events_and_equals_the_whole_answer(live: Live) -> None:
    events = live.named_events(PATH, messages=[SUM], max_tokens=100)
    assert all(name == data["type"] for name, data in events)
    names = [name for name, _ in events]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0][1]["message"]["content"] == []
    text = "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta")
    assert text == ask(live)["content"][0]["text"]
    assert events[-2][1]["usage"]["output_tokens"] == ask(live)["usage"]["output_tokens"]


def test_a_call_its_result_and_the_answer(live: Live) -> None:
    body = ask(live, ASK, tools=[BUY])
    assert body["stop_reason"] == "tool_use"
    call = body["content"][-1]
    assert (call["name"], call["input"]) == ("buy", {"product": "cider", "amount": 6})
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": '{"paid": 12}'}]}
    answer = ask(
        live, ASK, {"role": "assistant", "content": body["content"]}, {"role": "user", "content": [result]}, tools=[BUY]
    )
    assert answer["content"][0]["text"] == "I bought 6 pieces of cider for 12 coins."


def test_blocks_follow_each_other_with_their_own_indexes() -> None:
    data, message = translated(
        Started(USAGE),
        Reasoning("so"),
        Reasoning("mehow"),
        Text("Hi"),
        CallStarted(0, "call_a", "f"),
        CallArguments(0, '{"a":'),
        CallArguments(0, "1}"),
        CallEnded(0),
        CallStarted(1, "call_b", "g"),
        CallEnded(1),
        Finished("tool_calls", USAGE),
    )
    starts = [item["index"] for item in data if item["type"] == "content_block_start"]
    stops = [item["index"] for item in data if item["type"] == "content_block_stop"]
    assert starts == stops == [0, 1, 2, 3]
    deltas = [item["delta"]["type"] for item in data if item["type"] == "content_block_delta"]
    assert deltas == ["thinking_delta", "thinking_delta", "signature_delta", "text_delta", *["input_json_delta"] * 2]
    thinking, text, first, second = message["content"]
    assert (thinking["thinking"], thinking["signature"] != "", text["text"]) == ("somehow", True, "Hi")
    assert (first["input"], second["input"]) == ({"a": 1}, {})
    assert data[-2]["usage"]["input_tokens"] == 6
    assert data[-2]["usage"]["cache_read_input_tokens"] == 4
    assert data[-2]["usage"]["output_tokens"] == 7


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("stop", "end_turn"),
        ("stop_string", "stop_sequence"),
        ("length", "max_tokens"),
        ("context", "model_context_window_exceeded"),
        ("tool_calls", "tool_use"),
    ],
)
def test_ends_have_their_names(reason: Any, expected: str) -> None:
    data, message = translated(Text("x"), Finished(reason, USAGE, "END" if reason == "stop_string" else None))
    assert data[-2]["delta"]["stop_reason"] == message["stop_reason"] == expected
    assert data[-2]["delta"]["stop_sequence"] == ("END" if reason == "stop_string" else None)


def test_a_call_that_is_cut_off_keeps_its_text() -> None:
    data, message = translated(CallStarted(0, "c", "f"), CallArguments(0, '{"a": "b'), Finished("length", USAGE))
    assert data[-3]["type"] == "content_block_stop"
    assert message["stop_reason"] == "max_tokens"
    assert message["content"][0]["input"] == {"INVALID_JSON": '{"a": "b'}


def test_a_failure_after_the_beginning_is_an_event() -> None:
    data, _ = translated(Text("x"), Failed(ApiError("broken", status=500)))
    assert data[-1]["type"] == "error"
    assert data[-1]["error"] == {"type": "api_error", "message": "broken"}
    assert MessageStream("demo", 1).ping() == b'event: ping\ndata: {"type":"ping"}\n\n'


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_errors_have_the_types_of_the_api(status: int, kind: str) -> None:
    body = error_body(f"{PATH}/count_tokens", ApiError("x", status=status))
    assert body["type"] == "error"
    assert body["error"] == {"type": kind, "message": "x"}
    assert body["request_id"]


def test_stop_sequences_end_the_answer(live: Live) -> None:
    body = ask(live, stop_sequences=[" is"])
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", " is")
    assert body["content"][0]["text"] == "17 plus 25"


def test_thinking_is_a_block_and_comes_back(live: Live) -> None:
    body = ask(live, max_tokens=200, thinking={"type": "enabled", "budget_tokens": 1024})
    first = body["content"][0]
    assert first["type"] == "thinking"
    assert first["thinking"]
    assert first["signature"]
    earlier = {"role": "assistant", "content": body["content"]}
    assert ask(live, SUM, earlier, SUM, thinking={"type": "adaptive"})["type"] == "message"
    assert all(block["type"] != "thinking" for block in ask(live, thinking={"type": "disabled"})["content"])


def test_the_billing_block_and_marks_of_caches_do_not_reach_the_prompt(live: Live) -> None:
    header = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.abc; cch=12345;"}
    rule = {"type": "text", "text": "Answer briefly."}
    plain = prompt(live, messages=[SUM], system=[rule])
    marked = {**rule, "cache_control": {"type": "ephemeral"}}
    assert prompt(live, messages=[SUM], system=[header, marked]) == plain
    assert prompt(live, messages=[SUM], system=[header]) == prompt(live, messages=[SUM])


def test_a_late_system_message_stays_in_place(live: Live) -> None:
    note = {"role": "system", "content": [{"type": "text", "text": "Be kind."}]}
    joined = {"role": "user", "content": f"{SUM['content']}\n\nBe kind."}
    assert prompt(live, messages=[SUM, note]) == prompt(live, messages=[joined])
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "buy", "input": {"a": True}}]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "done"}]}
    for order, text in (([call, result, note], "done\n\nBe kind."), ([call, note, result], "Be kind.\n\ndone")):
        inside = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": text}]}
        assert prompt(live, messages=[ASK, *order]) == prompt(live, messages=[ASK, call, inside])


def test_results_come_before_the_text_beside_them(live: Live) -> None:
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "buy", "input": {}}]}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "done"}
    text = {"type": "text", "text": "And now?"}
    orders = [[result, text], [text, result]]
    counts = {prompt(live, messages=[ASK, call, {"role": "user", "content": order}]) for order in orders}
    apart = [{"role": "user", "content": [result]}, {"role": "user", "content": [text]}]
    assert counts == {prompt(live, messages=[ASK, call, *apart])}


def test_search_results_references_and_documents_are_text(live: Live) -> None:
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "buy", "input": {}}]}
    text = {"type": "text", "text": "Found."}

    def count(block: Any, *, inside: bool) -> int:
        result = {"type": "tool_result", "tool_use_id": "t1", "content": [block]}
        messages = (
            [ASK, call, {"role": "user", "content": [result]}] if inside else [{"role": "user", "content": [block]}]
        )
        return prompt(live, messages=messages)

    for block, expected in (
        ({"type": "search_result", "title": "T", "source": "S", "content": [text], "citations": {}}, "T\nS\nFound."),
        ({"type": "tool_reference", "tool_name": "buy"}, "The tool buy can be called."),
        ({"type": "document", "title": "T", "source": {"type": "text", "data": "D"}}, "T\nD"),
        (
            {"type": "document", "context": "C", "source": {"type": "content", "content": [text, text]}},
            "C\nFound.\nFound.",
        ),
    ):
        for inside in (False, True):
            assert count(block, inside=inside) == count({"type": "text", "text": expected}, inside=inside)


def test_an_error_of_a_tool_is_marked(live: Live) -> None:
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "buy", "input": {}}]}

    def count(content: str, *, is_error: bool) -> int:
        block = {"type": "tool_result", "tool_use_id": "t1", "content": content, "is_error": is_error}
        return prompt(live, messages=[ASK, call, {"role": "user", "content": [block]}])

    assert count("sold out", is_error=True) == count("Error: sold out", is_error=False)
    assert count("Error: no", is_error=True) == count("Error: no", is_error=False)


def test_counting_neither_needs_max_tokens_nor_room(live: Live) -> None:
    long = {"role": "user", "content": "apple " * 5000}
    count = prompt(live, messages=[long])
    most = live.service.engine.model.config.max_context
    assert count > most
    assert prompt(live, messages=[SUM], tools=[BUY]) > prompt(live, messages=[SUM])
    error = ask(live, long, status=400, stream=True)["error"]
    assert error == {"type": "invalid_request_error", "message": f"prompt is too long: {count} tokens > {most} maximum"}


def test_fields_and_tools_of_agents_are_taken(live: Live) -> None:
    body = ask(
        live,
        tools=[BUY, {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        metadata={"user_id": "x"},
        output_config={"effort": "high"},
        thinking={"type": "adaptive"},
        tool_choice={"type": "none"},
    )
    assert body["type"] == "message"


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"model": None}, "model"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_reference"}]}]}, "messages[0].content[0].tool_name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "search_result", "content": [{"type": "image"}]}]}]},
            "messages[0].content[0].content[0].type",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image"}]}],
                    }
                ]
            },
            "messages[0].content[0].content[0].type",
        ),
        ({"messages": [SUM, {"role": "assistant", "content": "It is"}]}, "messages[1].role"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"system": 3}, "system"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "f", "input_schema": []}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"temperature": -1}, "temperature"),
        ({"stop_sequences": [1]}, "stop_sequences"),
    ],
)
def test_a_wrong_field_is_named(live: Live, fields: dict[str, Any], place: str) -> None:
    body = live.post(PATH, status=400, **{"model": "demo", "max_tokens": 9, "messages": [SUM], **fields})
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith(f"{place} ")


def test_calls_and_schemas_are_enforced(live: Live) -> None:
    body = ask(live, tools=[BUY], tool_choice={"type": "tool", "name": "buy", "disable_parallel_tool_use": True})
    assert [block["name"] for block in body["content"]] == ["buy"]
    assert ask(live, tools=[BUY], tool_choice={"type": "any"})["stop_reason"] == "tool_use"
    schema = {
        "type": "object",
        "properties": {"sum": {"enum": [42]}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    (block,) = ask(live, output_config={"format": {"type": "json_schema", "schema": schema}})["content"]
    assert json.loads(block["text"]) == {"sum": 42}
