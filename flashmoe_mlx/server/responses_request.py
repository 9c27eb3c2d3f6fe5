"""Translation of requests of the OpenAI Responses API to conversations."""

from typing import Any

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.server.constraints import constraint_options, offered_tools
from flashmoe_mlx.server.conversation import MOST_TOOLS, Conversation, Message, merge_system_messages, text_of
from flashmoe_mlx.server.fields import Fields
from flashmoe_mlx.server.options import check_size, sampling_options, template_options

_MOST_ITEMS = 10_000
_MOST_PARTS = 1_000
_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
_STORED = {"previous_response_id": "response", "conversation": "conversation", "prompt": "prompt"}


def parse_input(fields: Fields, engine: Engine) -> Conversation:
    """Return the conversation that a request describes.

    Raises:
        ApiError: a field is wrong, or needs an earlier response: this server stores none.
    """
    for name, stored in _STORED.items():
        if name in fields:
            fields.refuse(name, f"needs a stored {stored}, and this server stores none: send all items", "unsupported")
    if fields.flag("background"):
        fields.refuse("background", "must be false: this server stores no responses", code="unsupported")
    messages: list[Message] = []
    if instructions := fields.text("instructions"):
        messages.append({"role": "system", "content": instructions})
    if isinstance(fields.any("input"), str):
        messages.append({"role": "user", "content": fields.any("input")})
    else:
        items = fields.objects("input", _MOST_ITEMS)
        if not items:
            fields.refuse("input", "is required: text, or a list with at least one item", code="missing_field")
        messages += _messages(items)
    limits = {**fields.content, "max_tokens": None, "max_completion_tokens": None, "stop": None, "n": None}
    options = sampling_options(Fields(limits), engine) | template_options(fields, engine)
    most = fields.integer("max_output_tokens", 1, 2**31 - 1)
    options["max_tokens"] = min(most or options["max_tokens"], options["max_tokens"])
    tools = offered_tools(fields, _functions(fields))
    asked = {
        "tool_choice": fields.any("tool_choice"),
        "parallel_tool_calls": fields.any("parallel_tool_calls"),
        "response_format": _response_format(fields),
    }
    options |= constraint_options(Fields(asked), tools)
    return Conversation(merge_system_messages(messages), tools, options)


def _messages(items: list[Fields]) -> list[Message]:
    """Return messages; an assistant's text, thinking and calls in a row are one message.

    Items of the provider's own tools, which this server does not have, are left out.
    """
    messages: list[Message] = []
    for item in items:
        match item.any("type") or "message":
            case "message":
                _add_message(messages, item)
            case "reasoning":
                answer = _answer(messages)
                if answer["content"] or "tool_calls" in answer:
                    messages.append(answer := {"role": "assistant", "content": ""})
                answer["reasoning_content"] = answer.get("reasoning_content", "") + _thinking(item)
            case "function_call":
                arguments = item.any("arguments")
                if not isinstance(arguments, str | None):
                    item.refuse("arguments", "must be the JSON text of an object")
                function: dict[str, Any] = {"name": item.required_text("name", 256), "arguments": arguments or {}}
                call = {"id": item.required_text("call_id", 256), "type": "function", "function": function}
                _answer(messages).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                text = text_of(item.any("output"), f"{item.place}output")
                call_id = item.required_text("call_id", 256)
                messages.append({"role": "tool", "content": text, "tool_call_id": call_id})
            case "item_reference":
                item.refuse("type", "item_reference needs a stored response, and none is stored", code="unsupported")
    return messages


def _add_message(messages: list[Message], item: Fields) -> None:
    role = item.choice("role", *_ROLES)
    if role is None:
        item.refuse("role", "is required: user, assistant, system or developer", code="missing_field")
    if "content" not in item:
        item.refuse("content", "is required", code="missing_field")
    text = text_of(item.any("content"), f"{item.place}content")
    if role == "assistant":
        answer = _answer(messages)
        if "tool_calls" in answer:
            messages.append(answer := {"role": "assistant", "content": ""})
        answer["content"] += text
    else:
        messages.append({"role": _ROLES[role], "content": text})


def _answer(messages: list[Message]) -> Message:
    """Return the assistant's message at the end, which may be new."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _thinking(item: Fields) -> str:
    """Return the thinking of an item: its content, or else its summary."""
    for name in ("content", "summary"):
        parts = item.objects(name, _MOST_PARTS)
        if parts:
            return "\n".join(part.text("text") or "" for part in parts)
    return ""


def _functions(fields: Fields) -> list[dict[str, Any]]:
    """Return the declarations of functions in the form of the chat API, without tools of other types."""
    tools = []
    for tool in fields.objects("tools", MOST_TOOLS) or []:
        if tool.any("type") != "function":
            continue
        check_size(tool.content, tool.place.rstrip("."))
        tool.required_text("name", 256)
        names = ("name", "description", "parameters", "strict")
        tools.append({"type": "function", "function": {name: tool.any(name) for name in names if name in tool}})
    return tools


def _response_format(fields: Fields) -> Any:
    """Return the form of the answer as the chat API has it."""
    text = fields.object("text")
    form = text.object("format") if text else None
    if form is None:
        return None
    kind = form.choice("type", "text", "json_object", "json_schema")
    if kind != "json_schema":
        return {"type": kind}
    schema = form.object("schema")
    if schema is None:
        form.refuse("schema", "is required", code="missing_field")
    check_size(schema.content, "text.format.schema")
    names = ("name", "schema", "strict")
    return {"type": kind, "json_schema": {name: form.any(name) for name in names if name in form}}
