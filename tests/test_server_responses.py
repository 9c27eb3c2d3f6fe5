"""``/v1/responses``: items, events and fields of the OpenAI Responses API."""

import json
from typing import Any

import pytest
from serving import SUM, Live, parse_events

from flashmoe_mlx.server.errors import ApiError
from flashmoe_mlx.server.events import (
    CallArguments,
    CallEnded,
    CallStarted,
    EndReason,
    Event,
    Failed,
    Finished,
    Reasoning,
    Text,
    Usage,
)
from flashmoe_mlx.server.fields import Fields
from flashmoe_mlx.server.openai_responses import ResponseStream
from flashmoe_mlx.server.responses_request import parse_input

PATH = "/v1/responses"
BUY = {
    "type": "function",
    "name": "buy",
    "description": "Buy goods on the market",
    "parameters": {
        "type": "object",
        "properties": {"product": {"type": "string"}, "amount": {"type": "integer"}},
        "required": ["product", "amount"],
    },
    "strict": True,
}
ASK = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Please order cider, 6 pieces."}]}
USAGE = Usage(prompt=10, cached=4, completion=7, reasoning=2)


def respond(live: Live, given: Any = SUM["content"], *, status: int = 200, **fields: Any) -> dict[str, Any]:
    return live.post(PATH, status=status, **{"model": "demo", "input": given, "temperature": 0, **fields})


def translated(*events: Event) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the data of the stream of ``events``, and the response that it adds up to."""
    stream = ResponseStream("demo", Fields({}))
    text = (stream.opening() + b"".join(map(stream.frames, events))).decode()
    named = list(parse_events(iter(text.splitlines())))
    assert all(name == data["type"] for name, data in named)
    assert [data["sequence_number"] for _, data in named] == list(range(len(named)))
    return [data for _, data in named], stream.response


def messages(live: Live, *items: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return parse_input(Fields({"model": "demo", "input": list(items), **fields}), live.service.engine).messages


def test_a_response_has_the_form_of_the_api(live: Live) -> None:
    body = respond(live, instructions="Answer briefly.", max_output_tokens=100)
    assert (body["object"], body["status"], body["error"]) == ("response", "completed", None)
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    part = {"type": "output_text", "text": "17 plus 25 is 42.", "annotations": [], "logprobs": []}
    assert item["content"] == [part]
    assert body["instructions"] == "Answer briefly."
    usage = body["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_a_stream_equals_the_whole_response(live: Live) -> None:
    events = live.named_events(PATH, input=SUM["content"])
    assert all(name == data["type"] for name, data in events)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    names = [name for name, _ in events]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(data["delta"] for name, data in events if name == "response.output_text.delta")
    final = events[-1][1]["response"]
    assert final["output"][0]["content"][0]["text"] == text == respond(live)["output"][0]["content"][0]["text"]
    assert events[0][1]["response"]["status"] == "in_progress"


def test_a_call_its_result_and_the_answer(live: Live) -> None:
    body = respond(live, [ASK], tools=[BUY])
    call = body["output"][-1]
    assert (call["type"], call["name"]) == ("function_call", "buy")
    assert json.loads(call["arguments"]) == {"product": "cider", "amount": 6}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": '{"paid": 12}'}
    answer = respond(live, [ASK, *body["output"], result], tools=[BUY])
    assert answer["output"][0]["content"][0]["text"] == "I bought 6 pieces of cider for 12 coins."


def test_items_follow_each_other_with_their_own_indexes() -> None:
    data, response = translated(
        Reasoning("so"),
        Text("Hi"),
        CallStarted(0, "call_a", "f"),
        CallArguments(0, '{"a":'),
        CallArguments(0, "1}"),
        CallEnded(0),
        Finished("tool_calls", USAGE),
    )
    kinds = [item["type"].removeprefix("response.") for item in data]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [item["output_index"] for item in data[2:-1]] == [0] * 6 + [1] * 6 + [2] * 5
    assert data[-3]["arguments"] == response["output"][2]["arguments"] == '{"a":1}'
    assert {item["item_id"] for item in data if "item_id" in item} == {item["id"] for item in response["output"]}
    assert data[2]["item"]["content"] == []
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == 4


@pytest.mark.parametrize("reason", ["length", "context"])
def test_a_response_that_is_cut_off_is_incomplete(reason: EndReason) -> None:
    data, response = translated(CallStarted(0, "c", "f"), CallArguments(0, '{"a'), Finished(reason, USAGE))
    assert data[-1]["type"] == "response.incomplete"
    assert response["status"] == response["output"][0]["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_failure_after_the_beginning_is_an_event() -> None:
    data, response = translated(Text("x"), Failed(ApiError("broken", status=500, code="internal_error")))
    assert data[-1]["type"] == "response.failed"
    assert response["status"] == "failed"
    assert data[-1]["response"]["error"] == {"code": "server_error", "message": "broken"}


def test_the_sign_of_life_is_an_event_with_a_number() -> None:
    stream = ResponseStream("demo", Fields({}))
    stream.opening()
    ((name, data),) = parse_events(iter(stream.ping().decode().splitlines()))
    assert (name, data["type"], data["sequence_number"]) == ("response.in_progress", "response.in_progress", 2)
    assert data["response"]["status"] == "in_progress"


def test_the_items_of_one_answer_are_one_message(live: Live) -> None:
    thinking = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    answer = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi"}]}
    calls = [{"type": "function_call", "call_id": name, "name": "f", "arguments": "{}"} for name in "ab"]
    results = [{"type": "function_call_output", "call_id": name, "output": name} for name in "ab"]
    role = {"role": "developer", "content": "Be kind."}
    found = messages(
        live, role, ASK, thinking, answer, *calls, *results, {"type": "web_search_call", "id": "w"}, answer
    )
    assert [message["role"] for message in found] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    first = found[2]
    assert (first["reasoning_content"], first["content"]) == ("hm", "Hi")
    assert [call["id"] for call in first["tool_calls"]] == ["a", "b"]
    assert [message["content"] for message in found[3:]] == ["a", "b", "Hi"]


def test_tools_of_other_types_are_left_out(live: Live) -> None:
    namespace = {"type": "namespace", "name": "agents", "tools": [BUY]}
    fields = {"input": [ASK], "tools": [namespace, {"type": "web_search"}, BUY], "tool_choice": "auto"}
    (tool,) = parse_input(Fields(fields), live.service.engine).tools
    assert tool["function"]["name"] == "buy"
    body = respond(
        live,
        [ASK],
        tools=[namespace, {"type": "web_search"}, BUY],
        parallel_tool_calls=True,
        reasoning={"summary": "auto"},
        include=["reasoning.encrypted_content"],
        prompt_cache_key="x",
        client_metadata={"a": "b"},
        store=False,
    )
    assert body["output"][-1]["name"] == "buy"


def test_a_prompt_beyond_the_context_is_refused_before_the_stream(live: Live) -> None:
    error = respond(live, "apple " * 5000, status=400, stream=True)["error"]
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "always"}}, "tool_choice.mode"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [3], "tool_choice": "none"}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"reasoning": "high"}, "reasoning"),
    ],
)
def test_a_wrong_field_is_named(live: Live, fields: dict[str, Any], param: str) -> None:
    error = live.post(PATH, status=400, **{"model": "demo", "input": "Hello", **fields})["error"]
    assert error["param"] == param
    assert error["message"].startswith(param)


def test_calls_and_schemas_are_enforced(live: Live) -> None:
    other = {"type": "function", "name": "sell", "parameters": {"type": "object", "properties": {}}}
    choices: list[Any] = [{"type": "function", "name": "buy"}]
    choices.append({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "buy"}]})
    for choice in choices:
        body = respond(live, tools=[other, BUY], tool_choice=choice, parallel_tool_calls=False)
        assert [item["name"] for item in body["output"]] == ["buy"]
    schema = {
        "type": "object",
        "properties": {"sum": {"enum": [42]}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    body = respond(live, text={"format": {"type": "json_schema", "name": "sum", "schema": schema, "strict": True}})
    assert json.loads(body["output"][0]["content"][0]["text"]) == {"sum": 42}
