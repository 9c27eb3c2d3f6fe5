"""``POST /v1/chat/completions``."""

import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.logprobs import TokenLogprobs
from flashmoe_mlx.server.answer import Prepared
from flashmoe_mlx.server.calls import Call
from flashmoe_mlx.server.constraints import constraint_options, offered_tools
from flashmoe_mlx.server.conversation import Conversation, Message, merge_system_messages, text_of
from flashmoe_mlx.server.errors import openai_error
from flashmoe_mlx.server.events import (
    CallArguments,
    CallStarted,
    Event,
    Failed,
    Finished,
    Reasoning,
    Text,
)
from flashmoe_mlx.server.fields import Fields
from flashmoe_mlx.server.options import (
    FINISH_REASONS,
    declared_tools,
    sampling_options,
    template_options,
    usage_json,
)
from flashmoe_mlx.server.streaming import EventStream, WholeAnswer, frame

_MOST_MESSAGES = 10_000
_MOST_CALLS = 1_000
_MOST_LOGPROBS = 20
_ROLES = {"developer": "system", "function": "tool"}
_REASONING_FIELDS = ("reasoning_content", "reasoning")
LogprobsJson = Callable[[tuple[TokenLogprobs, ...]], dict[str, Any] | None]


async def chat_completions(request: Request) -> EventStream | WholeAnswer:
    """Answer a conversation."""
    call = await Call.read(request)
    fields, service = call.fields, call.service
    model = fields.required_text("model", 256)
    service.check_model(model)
    engine = service.engine
    conversation = parse_conversation(fields, engine)
    stream = fields.flag("stream")
    stream_options = fields.object("stream_options")
    usage = stream_options is not None and stream_options.flag("include_usage")

    async def prepare() -> Prepared:
        return await service.prepare(conversation)

    answer = await call.answer(prepare)
    wanted = conversation.options.get("logprobs") is not None
    logprobs = _logprobs_writer(engine) if wanted else lambda _: None
    if stream:
        return call.stream(answer, _ChatStream(model, logprobs, usage=usage))
    return call.whole([answer], lambda events: _whole(model, events[0], logprobs))


def parse_conversation(fields: Fields, engine: Engine) -> Conversation:
    """Return the conversation that a request describes.

    Raises:
        ApiError: a field is wrong.
    """
    given = fields.objects("messages", _MOST_MESSAGES)
    if not given:
        fields.refuse("messages", "is required: a list with at least one message", code="missing_field")
    messages = merge_system_messages([_message(message) for message in given])
    options = sampling_options(fields, engine) | template_options(fields, engine)
    if fields.flag("logprobs"):
        options["logprobs"] = fields.integer("top_logprobs", 0, _MOST_LOGPROBS) or 0
    elif fields.integer("top_logprobs", 0, _MOST_LOGPROBS):
        fields.refuse("top_logprobs", "needs logprobs: true")
    tools = offered_tools(fields, declared_tools(fields))
    options |= constraint_options(fields, tools)
    return Conversation(messages, tools, options)


def _message(fields: Fields) -> Message:
    """Return a message in the form of ``Conversation``."""
    role = fields.required_text("role", 32)
    role = _ROLES.get(role, role)
    if role not in ("system", "user", "assistant", "tool"):
        fields.refuse("role", "must be one of developer, system, user, assistant, tool")
    message: Message = {"role": role, "content": text_of(fields.any("content"), f"{fields.place}content")}
    if role == "assistant":
        reasoning = next((text for name in _REASONING_FIELDS if (text := fields.text(name))), None)
        if reasoning:
            message["reasoning_content"] = reasoning
        calls = [_call(call) for call in fields.objects("tool_calls", _MOST_CALLS) or []]
        if calls:
            message["tool_calls"] = calls
    elif "content" not in fields:
        fields.refuse("content", "is required", code="missing_field")
    if role == "tool":
        message["tool_call_id"] = fields.text("tool_call_id", 256) or ""
    return message


def _call(fields: Fields) -> dict[str, Any]:
    function = fields.object("function")
    if function is None:
        fields.refuse("function", "is required", code="missing_field")
    arguments = function.any("arguments")
    if not isinstance(arguments, str | dict | None):
        function.refuse("arguments", "must be the JSON text of an object")
    return {
        "id": fields.text("id", 256) or "",
        "type": "function",
        "function": {"name": function.required_text("name", 256), "arguments": arguments or {}},
    }


def _logprobs_writer(engine: Engine) -> LogprobsJson:
    tokenizer = engine.tokenizer

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        shown = data.decode(errors="replace")
        return {"token": shown, "logprob": max(logprob, -9999.0), "bytes": list(data)}

    def write(logprobs: tuple[TokenLogprobs, ...]) -> dict[str, Any]:
        content = [
            entry(item.token_id, item.logprob) | {"top_logprobs": [entry(*likely) for likely in item.top]}
            for item in logprobs
        ]
        return {"content": content, "refusal": None}

    return write


class _ChatStream:
    """The chunks of a streamed answer. Later parts of a call omit its id and name, since clients join repeated ones."""

    def __init__(self, model: str, logprobs: LogprobsJson, *, usage: bool) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._logprobs = logprobs
        self._usage = usage

    def opening(self) -> bytes:
        """Return the chunk with the role."""
        return self._chunk({"role": "assistant", "content": ""})

    def ping(self) -> bytes:
        """Return a comment, which readers skip."""
        return b": keep-alive\n\n"

    def frames(self, event: Event) -> bytes:
        """Return the chunks of an event."""
        match event:
            case Text(text, logprobs):
                return self._chunk({"content": text}, logprobs=self._logprobs(logprobs))
            case Reasoning(text):
                return self._chunk({"reasoning_content": text})
            case CallStarted(index, call_id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": call_id, "type": "function", "function": function}
                return self._chunk({"tool_calls": [call]})
            case CallArguments(index, text):
                return self._chunk({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
            case Finished(reason, usage):
                last = self._chunk({}, FINISH_REASONS[reason])
                total = frame({**self._head, "choices": [], "usage": usage_json(usage)}) if self._usage else b""
                return last + total + b"data: [DONE]\n\n"
            case Failed(error):
                return frame(openai_error(error))
            case _:
                return b""

    def _chunk(
        self, delta: Mapping[str, Any], finish_reason: str | None = None, logprobs: Mapping[str, Any] | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return frame({**self._head, "choices": [choice]})


def _whole(model: str, events: list[Event], logprobs: LogprobsJson) -> dict[str, Any]:
    """Return the body of an answer that is not streamed."""
    finished = events[-1]
    assert isinstance(finished, Finished)
    texts = [event for event in events if isinstance(event, Text)]
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        if isinstance(event, CallStarted):
            calls[event.index] = {
                "id": event.call_id,
                "type": "function",
                "function": {"name": event.name, "arguments": ""},
            }
        elif isinstance(event, CallArguments):
            calls[event.index]["function"]["arguments"] += event.text
    content = "".join(event.text for event in texts)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content if content or not calls else None,
        "refusal": None,
        "annotations": [],
    }
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = list(calls.values())
    choice = {
        "index": 0,
        "message": message,
        "logprobs": logprobs(tuple(entry for event in texts for entry in event.logprobs)),
        "finish_reason": FINISH_REASONS[finished.reason],
    }
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": usage_json(finished.usage),
        "service_tier": "default",
        "system_fingerprint": "flashmoe_mlx",
    }
