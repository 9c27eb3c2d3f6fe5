"""Convert the messages of a conversation from the form that clients send to the form that chat templates read.

Clients of the OpenAI API send the arguments of tool calls as JSON text, and contents as lists of parts. Most templates
expect objects and plain text.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from flashmoe_mlx.errors import InputError

INVALID = "invalid_messages"
"""The error code of messages that no template can render."""

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_ROLES = ("system", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")


def normalize_messages(messages: Sequence[Mapping[str, Any]], keep_json_text: bool = False) -> list[dict[str, Any]]:
    """Return copies of ``messages`` for a chat template, made of JSON types only.

    Fields with the value None are left out. The reasoning of the model is present under every name that templates read.
    Arguments of tool calls become objects; with ``keep_json_text``, arguments given as JSON text stay text.

    Raises:
        InputError: the list is empty, a message is not an object with a role, a value has no JSON type, a tool call has
            no name, or its arguments are not a JSON object. The error names the message and the field.
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
        fields = {name: to_json_types(value, f"{place}.{name}") for name, value in message.items() if value is not None}
        reasoning = next((fields[name] for name in _REASONING_FIELDS if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        if "tool_calls" in fields:
            _normalize_calls(fields["tool_calls"], f"{place}.tool_calls", keep_json_text)
        if "function_call" in fields:
            raise _invalid(f"{place}.function_call", "is not supported by chat templates; send tool_calls")
        result.append(fields)
    return result


def join_text_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Return ``messages`` with the text parts of each content joined; None if no content is a list of parts."""
    result = [dict(message) for message in messages]
    lists = [message for message in result if isinstance(message.get("content"), list)]
    for message in lists:
        message["content"] = "".join(_part_text(part) or "" for part in message["content"])
    return result if lists else None


def find_non_text_content(messages: Sequence[Mapping[str, Any]]) -> str:
    """Describe the first content that is not text, and its place; return an empty string if there is none."""
    for index, message in enumerate(messages):
        place, content = f"messages[{index}].content", message.get("content", "")
        if isinstance(content, list):
            description = find_non_text_part(content, place)
            if description:
                return description
        elif not isinstance(content, str):
            return f"{place} is neither text nor a list of parts"
    return ""


def find_non_text_part(parts: Sequence[Any], place: str) -> str:
    """Describe the first of the ``parts`` at ``place`` that is not text; return an empty string if there is none."""
    for position, part in enumerate(parts):
        if _part_text(part) is None:
            kind = part.get("type") if isinstance(part, Mapping) else None
            name = f"a part of type {kind!r}" if isinstance(kind, str) else "not a part with a type and a text"
            return f"{place}[{position}] is {name}"
    return ""


def find_unusual_role(messages: Sequence[Mapping[str, Any]], reason: str) -> str:
    """Describe the first unusual role, if the template's ``reason`` is about roles but does not name it.

    Return an empty string if there is none.
    """
    about_roles = "role" in reason or "user" in reason
    for index, message in enumerate(messages if about_roles else ()):
        if message["role"] not in _ROLES and message["role"] not in reason:
            return f"messages[{index}].role is {message['role']!r}"
    return ""


def to_json_types(value: Any, place: str) -> Any:
    """Return a copy of ``value`` made of JSON types only, so that a template cannot call methods of other types.

    Raises:
        InputError: a value has no JSON type; the error begins with ``place``.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_to_json_key(name, place): to_json_types(item, place) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [to_json_types(item, place) for item in value]
    raise _invalid(place, f"has a value of type {type(value).__name__}, which JSON does not have")


def _to_json_key(name: Any, place: str) -> Any:
    if name is None or isinstance(name, str | int | float):
        return to_json_types(name, place)
    raise _invalid(place, f"has a key of type {type(name).__name__} instead of text")


def _normalize_calls(calls: Any, place: str, keep_json_text: bool) -> None:
    """Check ``calls`` and parse arguments given as JSON text, in place."""
    if not isinstance(calls, list):
        raise _invalid(place, "must be a list of calls")
    for index, call in enumerate(calls):
        nested = isinstance(call, dict) and "function" in call
        function = call["function"] if nested else call
        where = f"{place}[{index}]{'.function' if nested else ''}"
        if not isinstance(function, dict):
            raise _invalid(where, "must be an object with a name and arguments")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise _invalid(f"{where}.name", "must be a text that is not empty")
        text = function.get("arguments", {})
        if isinstance(text, str):
            arguments = _parse_arguments(text, f"{where}.arguments")
            if not keep_json_text or not text.strip():
                function["arguments"] = arguments
        elif text is None:
            function["arguments"] = {}
        elif not isinstance(text, dict):
            raise _invalid(f"{where}.arguments", "must be a JSON object, or its text")


def _parse_arguments(text: str, place: str) -> dict[str, Any]:
    """Parse the JSON text of an object; blank text stands for an empty object."""
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
    """Return the text of a content part; None if the part is not text."""
    if isinstance(part, Mapping) and part.get("type", "text") in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    return part if isinstance(part, str) else None


def _invalid(place: str, reason: str) -> InputError:
    return InputError(f"{place} {reason}", code=INVALID)
