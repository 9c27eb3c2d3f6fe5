"""Messages of a conversation as clients send them, made ready for chat templates.

Clients of the OpenAI API send the arguments of tool calls as JSON text and contents as lists of parts. Most templates
want objects and plain text.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from flashmoe_mlx.errors import InputError

INVALID = "invalid_messages"
"""The error code of messages that no template could render."""

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_ROLES = ("system", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")


def plain_messages(messages: Sequence[Mapping[str, Any]], keep_json_text: bool = False) -> list[dict[str, Any]]:
    """Return copies of JSON types, as templates read them.

    Fields that are None are left out; the model's reasoning is under every name that templates read. Arguments of tool
    calls become objects; with ``keep_json_text`` they stay text where they are text.

    Raises:
        InputError: there is no message, one is not an object with a role, a value is not of a JSON type, a call has
            no name, or arguments are not a JSON object. It names the message and the field.
    """
    if not isinstance(messages, Sequence):
        raise InputError(f"messages must be a list, not {type(messages).__name__}", code=INVALID)
    if not messages:
        raise InputError("there are no messages to render", code=INVALID)
    result = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise _invalid(place, f"must be an object with a role and a content, not {type(message).__name__}")
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise _invalid(f"{place}.role", "must be text such as 'user'")
        fields = {name: plain(value, f"{place}.{name}") for name, value in message.items() if value is not None}
        reasoning = next((fields[name] for name in _REASONING_FIELDS if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        if "tool_calls" in fields:
            _read_calls(fields["tool_calls"], f"{place}.tool_calls", keep_json_text)
        if "function_call" in fields:
            raise _invalid(f"{place}.function_call", "is read by no template; send tool_calls")
        result.append(fields)
    return result


def joined_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Return the messages with lists of text parts joined; None where no content is such a list."""
    result = [dict(message) for message in messages]
    lists = [message for message in result if isinstance(message.get("content"), list)]
    for message in lists:
        message["content"] = "".join(_part_text(part) or "" for part in message["content"])
    return result if lists else None


def unusual_content(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return where a content is not text, and what it is; empty if all is text."""
    for index, message in enumerate(messages):
        place, content = f"messages[{index}].content", message.get("content", "")
        if isinstance(content, list):
            found = unusual_part(content, place)
            if found:
                return found
        elif not isinstance(content, str):
            return f"{place} is neither text nor a list of parts"
    return ""


def unusual_part(parts: Sequence[Any], place: str) -> str:
    """Return where a content in ``parts`` has other than text, and what it is; empty if all is text."""
    for position, part in enumerate(parts):
        if _part_text(part) is None:
            kind = part.get("type") if isinstance(part, Mapping) else None
            name = f"a part of type {kind!r}" if isinstance(kind, str) else "no part with a type and a text"
            return f"{place}[{position}] is {name}"
    return ""


def unusual_role(messages: Sequence[Mapping[str, Any]], reason: str) -> str:
    """Return where a role is unusual, if a template's ``reason`` is about roles and does not name it; else nothing."""
    about_roles = "role" in reason or "user" in reason
    for index, message in enumerate(messages if about_roles else ()):
        if message["role"] not in _ROLES and message["role"] not in reason:
            return f"messages[{index}].role is {message['role']!r}"
    return ""


def plain(value: Any, place: str) -> Any:
    """Return a copy made of JSON types alone: the methods of anything richer would be open to a template."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain_key(name, place): plain(item, place) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [plain(item, place) for item in value]
    raise _invalid(
        place, f"holds what JSON cannot: chat templates are given JSON values only, not {type(value).__name__}"
    )


def _plain_key(name: Any, place: str) -> Any:
    if name is None or isinstance(name, str | int | float):
        return plain(name, place)
    raise _invalid(place, f"has a name that is no text: {type(name).__name__}")


def _read_calls(calls: Any, place: str, keep_json_text: bool) -> None:
    """Check ``calls``, and replace JSON texts among their arguments by the objects that they are."""
    if not isinstance(calls, list):
        raise _invalid(place, "must be a list of calls")
    for index, call in enumerate(calls):
        nested = isinstance(call, dict) and "function" in call
        function = call["function"] if nested else call
        where = f"{place}[{index}]{'.function' if nested else ''}"
        if not isinstance(function, dict):
            raise _invalid(where, "must be an object with a name and arguments")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise _invalid(f"{where}.name", "must be text that is not empty")
        text = function.get("arguments", {})
        if isinstance(text, str):
            arguments = _parsed(text, f"{where}.arguments")
            if not keep_json_text or not text.strip():
                function["arguments"] = arguments
        elif text is None:
            function["arguments"] = {}
        elif not isinstance(text, dict):
            raise _invalid(f"{where}.arguments", "must be a JSON object, or the text of one")


def _parsed(text: str, place: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise _invalid(place, f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise _invalid(place, f"must be the text of a JSON object, not of {_JSON_NAMES[type(value)]}")
    return value


_JSON_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
}


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _part_text(part: Any) -> str | None:
    """Return the text of a content part; None if it is of another kind."""
    if isinstance(part, Mapping) and part.get("type", "text") in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    return part if isinstance(part, str) else None


def _invalid(place: str, reason: str) -> InputError:
    return InputError(f"{place} {reason}", code=INVALID)
