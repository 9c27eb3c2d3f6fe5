"""Translation of requests of the Anthropic Messages API to conversations."""

from typing import Any

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.server.constraints import constraint_options
from flashmoe_mlx.server.conversation import MOST_TOOLS, Conversation, Message, merge_system_messages
from flashmoe_mlx.server.fields import Fields
from flashmoe_mlx.server.options import check_size, given_messages, sampling_options, stop_strings, template_options

_MOST_BLOCKS = 10_000
_LARGEST_BUDGET = 2**31 - 1
_BILLING = "x-anthropic-billing-header:"
"""The beginning of a block of Claude Code that differs between sessions and is not meant for the model."""
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_FORCED = {"auto": "auto", "none": "none", "any": "required"}


def parse_messages(fields: Fields, engine: Engine) -> Conversation:
    """Return the conversation that a request describes.

    Raises:
        ApiError: a field is wrong.
    """
    given = given_messages(fields)
    if given[-1].any("role") == "assistant":
        given[-1].refuse(
            "role", "must not be assistant in the last message: an answer cannot be continued", code="unsupported"
        )
    messages = [_system(text) for text in _texts(fields, "system")]
    for message in given:
        messages += _messages(message)
    options = sampling_options(fields, engine) | _template_options(fields, engine)
    options["stop"] = stop_strings(fields, "stop_sequences")
    choice = _tool_choice(fields)
    tools = _tools(fields)
    options |= constraint_options(Fields({**choice, "response_format": _response_format(fields)}), tools)
    unwanted = choice.get("tool_choice") == "none"
    return Conversation(merge_system_messages(messages), [] if unwanted else tools, options)


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _texts(fields: Fields, name: str) -> list[str]:
    """Return the texts of a system prompt, without empty texts and billing headers."""
    blocks = _blocks(fields, name)
    for block in blocks:
        if block.any("type") != "text":
            block.refuse("type", "must be text", code="unsupported_content")
    texts = [block.text("text") or "" for block in blocks]
    return [text for text in texts if text and not text.startswith(_BILLING)]


def _blocks(fields: Fields, name: str) -> list[Fields]:
    """Return the blocks of a content; text stands for one block."""
    content = fields.any(name)
    if isinstance(content, str):
        return [Fields({"type": "text", "text": content}, f"{fields.place}{name}.")]
    return fields.objects(name, _MOST_BLOCKS) or []


def _messages(fields: Fields) -> list[Message]:
    """Return the messages of one message: results of tools are messages apart, before the text."""
    role = fields.choice("role", "user", "assistant", "system")
    if role is None:
        fields.refuse("role", "is required: user or assistant", code="missing_field")
    if "content" not in fields:
        fields.refuse("content", "is required", code="missing_field")
    if role == "system":
        return [_system(text) for text in _texts(fields, "content")]
    blocks = _blocks(fields, "content")
    if role == "assistant":
        return [_assistant(blocks)]
    results = [_result(block) for block in blocks if block.any("type") == "tool_result"]
    texts = [_text(block) for block in blocks if block.any("type") != "tool_result"]
    if texts or not results:
        results.append({"role": "user", "content": "\n\n".join(filter(None, texts))})
    return results


def _text(block: Fields) -> str:
    """Return the text of a block. Nothing is ever fetched from a URL."""
    kind = block.any("type")
    if kind == "text":
        if "text" not in block:
            block.refuse("text", "is required", code="missing_field")
        return block.text("text") or ""
    if kind == "search_result":
        return _lines(block.text("title"), block.text("source"), *map(_text, _blocks(block, "content")))
    if kind == "tool_reference":
        return f"The tool {block.required_text('tool_name', 256)} can be called."
    source = block.object("source") if kind == "document" else None
    if source is not None and source.any("type") in ("text", "content"):
        parts = [source.text("data")] if source.any("type") == "text" else map(_text, _blocks(source, "content"))
        return _lines(block.text("title"), block.text("context"), *parts)
    shown = kind if isinstance(kind, str) else type(kind).__name__
    return block.refuse("type", f"is {shown[:40]!r}: this model takes text only", code="unsupported_content")


def _lines(*texts: str | None) -> str:
    return "\n".join(filter(None, texts))


def _result(block: Fields) -> Message:
    """Return the message of a tool's result; an error says that it is one."""
    text = "\n".join(_text(part) for part in _blocks(block, "content"))
    if block.flag("is_error") and "error" not in text[:40].lower():
        text = f"Error: {text}"
    return {"role": "tool", "content": text, "tool_call_id": block.required_text("tool_use_id", 256)}


def _assistant(blocks: list[Fields]) -> Message:
    """Return an earlier answer. Blocks of Anthropic's own tools and encrypted thinking are left out."""
    texts, thinking, calls = [], [], []
    for block in blocks:
        match block.any("type"):
            case "thinking":
                thinking.append(block.text("thinking") or "")
            case "tool_use":
                arguments = block.object("input")
                function = {
                    "name": block.required_text("name", 256),
                    "arguments": {} if arguments is None else arguments.content,
                }
                calls.append({"id": block.required_text("id", 256), "type": "function", "function": function})
            case "text":
                texts.append(_text(block))
            case "image" | "document":
                block.refuse("type", "must not be an image or a document in an answer", code="unsupported_content")
    message: Message = {"role": "assistant", "content": "".join(texts)}
    if any(thinking):
        message["reasoning_content"] = "\n\n".join(filter(None, thinking))
    if calls:
        message["tool_calls"] = calls
    return message


def _tools(fields: Fields) -> list[dict[str, Any]]:
    """Return the declarations of functions, without Anthropic's own tools and without marks of their caches."""
    tools = []
    for tool in fields.objects("tools", MOST_TOOLS) or []:
        if tool.any("type") not in (None, "custom"):
            continue
        check_size(tool.content, tool.place.rstrip("."))
        function: dict[str, Any] = {"name": tool.required_text("name", 256)}
        if "description" in tool:
            function["description"] = tool.text("description")
        schema = tool.object("input_schema")
        function["parameters"] = {"type": "object", "properties": {}} if schema is None else schema.content
        if tool.flag("strict"):
            function["strict"] = True
        tools.append({"type": "function", "function": function})
    return tools


def _tool_choice(fields: Fields) -> dict[str, Any]:
    """Return ``tool_choice`` and ``parallel_tool_calls`` in the form of the chat API."""
    choice = fields.object("tool_choice")
    if choice is None:
        return {}
    kind = choice.choice("type", *_FORCED, "tool")
    if kind is None:
        choice.refuse("type", "is required: auto, any, tool or none", code="missing_field")
    chosen: dict[str, Any] = {
        "tool_choice": {"type": "function", "function": {"name": choice.required_text("name", 256)}}
        if kind == "tool"
        else _FORCED[kind]
    }
    if choice.flag("disable_parallel_tool_use"):
        chosen["parallel_tool_calls"] = False
    return chosen


def _response_format(fields: Fields) -> dict[str, Any] | None:
    """Return the schema of the answer in the form of the chat API; both places of it are in use."""
    config = fields.object("output_config")
    form = (config.object("format") if config else None) or fields.object("output_format")
    if form is None:
        return None
    form.choice("type", "json_schema")
    schema = form.object("schema")
    if schema is None:
        form.refuse("schema", "is required", code="missing_field")
    check_size(schema.content, f"{form.place}schema")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema.content, "strict": True}}


def _template_options(fields: Fields, engine: Engine) -> dict[str, Any]:
    """Return the options of the chat template; a model that cannot switch its thinking thinks as it always does.

    Without ``thinking``, a model that can switch it off does not think, as the API has it.
    """
    thinking = fields.object("thinking")
    kind = thinking.choice("type", "enabled", "disabled", "adaptive") if thinking else "disabled"
    if thinking:
        thinking.integer("budget_tokens", 1, _LARGEST_BUDGET)  # the length of thinking is the model's
    config = fields.object("output_config")
    effort = config.choice("effort", *_EFFORTS) if config else None
    chosen: dict[str, Any] = {"chat_template_kwargs": fields.any("chat_template_kwargs")}
    template = engine.tokenizer.chat_template
    if kind != "adaptive" and template is not None and template.reads("enable_thinking"):
        chosen["enable_thinking"] = kind == "enabled"
    if effort is not None and kind != "disabled":
        chosen["reasoning_effort"] = effort
    return template_options(Fields(chosen), engine)
