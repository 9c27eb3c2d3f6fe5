"""The chat API of OpenAI without HTTP: from the body of a request to a conversation, and from events to the answer."""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.logprobs import TokenLogprobs
from flashmoe_mlx.server.constraints import constraint_options, offered_tools
from flashmoe_mlx.server.conversation import Conversation, Message, merge_system_messages, text_of
from flashmoe_mlx.server.events import CallArguments, CallStarted, Event, Finished, Reasoning, Text, Usage
from flashmoe_mlx.server.fields import Fields
from flashmoe_mlx.server.options import (
    FINISH_REASONS,
    declared_tools,
    given_messages,
    sampling_options,
    template_options,
    usage_json,
)

_MOST_CALLS = 1_000
_MOST_LOGPROBS = 20
_ROLES = {"developer": "system", "function": "tool"}
_REASONING_FIELDS = ("reasoning_content", "reasoning")
LogprobsJson = Callable[[tuple[TokenLogprobs, ...]], dict[str, Any] | None]


def parse_conversation(fields: Fields, engine: Engine) -> Conversation:
    """Return the conversation that a request describes.

    Raises:
        ApiError: a field is wrong.
    """
    messages = merge_system_messages([_message(message) for message in given_messages(fields)])
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


def logprobs_writer(engine: Engine) -> LogprobsJson:
    """Return a function that writes log probabilities in the form of the chat API."""
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


def whole_answer(model: str, answers: Sequence[Sequence[Event]], logprobs: LogprobsJson) -> dict[str, Any]:
    """Return the body of an answer that is not streamed.

    Args:
        model: the name of the model.
        answers: the events of each choice, the last of which is ``Finished``.
        logprobs: writes the log probabilities.
    """
    choices, usages = [], []
    for index, events in enumerate(answers):
        finished = events[-1]
        assert isinstance(finished, Finished)
        usages.append(finished.usage)
        texts = [event for event in events if isinstance(event, Text)]
        choices.append(
            {
                "index": index,
                "message": _answer_message(events),
                "logprobs": logprobs(tuple(entry for event in texts for entry in event.logprobs)),
                "finish_reason": FINISH_REASONS[finished.reason],
            }
        )
    usage = Usage(
        usages[0].prompt,
        usages[0].cached,
        sum(usage.completion for usage in usages),
        sum(usage.reasoning for usage in usages),
    )
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage_json(usage),
        "service_tier": "default",
        "system_fingerprint": "flashmoe_mlx",
    }


def _answer_message(events: Sequence[Event]) -> dict[str, Any]:
    """Return the message that ``events`` make."""
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
    content = "".join(event.text for event in events if isinstance(event, Text))
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
    return message
