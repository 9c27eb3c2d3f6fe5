"""A conversation: the request that every API is translated to.

Messages have the form of the OpenAI API after normalization: ``role`` is "system", "user", "assistant" or "tool";
``content`` is text; an assistant's message may have ``reasoning_content`` and ``tool_calls``; a tool's message has
``tool_call_id``. Arguments of calls may be JSON text or objects.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flashmoe_mlx.server.errors import ApiError

Message = dict[str, Any]
MOST_TOOLS = 256


@dataclass(frozen=True, slots=True)
class Conversation:
    """A request for the next message of a conversation.

    Attributes:
        messages: the messages, oldest first. Each API passes them through ``merge_system_messages``.
        tools: declarations of functions, in the form of the OpenAI API, in the order of the client.
        options: arguments of ``Engine.request`` other than the prompt and the tools; absent ones have their defaults.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    options: Mapping[str, Any] = field(default_factory=dict)


def merge_system_messages(messages: list[Message]) -> list[Message]:
    """Join the leading system messages to one, and fold each later one into its neighbor, in place.

    Templates take one system message, at the beginning. A later message would change the whole prompt if it moved
    there, so its text joins the message before it: a user's text or the result of a tool. It never becomes a turn after
    results of tools, and never comes between a call and its result.
    """
    leading = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
    merged: list[Message] = []
    if leading:
        merged.append({"role": "system", "content": _join(message["content"] for message in messages[:leading])})
    held = ""
    for message in messages[leading:]:
        if message["role"] == "system":
            before = merged[-1]
            if before["role"] in ("user", "tool") and not held:
                merged[-1] = before | {"content": _join((before["content"], message["content"]))}
            else:
                held = _join((held, message["content"]))
        elif held and message["role"] in ("user", "tool"):
            merged.append(message | {"content": _join((held, message["content"]))})
            held = ""
        else:
            merged.append(message)
    if held:
        merged.append({"role": "user", "content": held})
    return merged


def _join(texts: Any) -> str:
    return "\n\n".join(text for text in texts if text)


def text_of(content: Any, place: str) -> str:
    """Return the text of a content: text, a list of text parts, or null.

    Raises:
        ApiError: a part is not text. Nothing is ever fetched from a URL.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(f"{place} must be a string or a list of parts", param=place)
    texts = []
    for index, part in enumerate(content):
        where = f"{place}[{index}]"
        if not isinstance(part, dict):
            raise ApiError(f"{where} must be an object with a type", param=where)
        kind = part.get("type")
        name = "refusal" if kind == "refusal" else "text"
        if kind not in ("text", "input_text", "output_text", "refusal"):
            shown = kind if isinstance(kind, str) else type(kind).__name__
            raise ApiError(
                f"{where} is a part of type {shown[:40]!r}: this model takes text only",
                code="unsupported_content",
                param=where,
            )
        if not isinstance(part.get(name), str):
            raise ApiError(f"{where}.{name} must be a string", param=f"{where}.{name}")
        texts.append(part[name])
    return "".join(texts)
