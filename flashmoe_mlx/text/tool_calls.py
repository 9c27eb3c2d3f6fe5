"""Tool calls in the markup of Qwen3.5: ``<tool_call>``, ``<function=NAME>``, a ``<parameter=NAME>`` for each argument.

The markup says no types: a value is text, or JSON where the tool's schema wants another type.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_CALL = re.compile(r"<tool_call>\s*<function=([^>\n]+)>\s*(.*?)</function>\s*</tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?((?:(?!<parameter=).)*?)\n?</parameter>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function's name and its arguments as JSON values."""

    name: str
    arguments: dict[str, Any]


def parse_tool_calls(text: str, tools: Sequence[Mapping[str, Any]] = ()) -> tuple[str, list[ToolCall]]:
    """What a model said beside its calls, and the calls, in order.

    ``tools`` are declarations as the chat template gets them; a value whose schema is not a string's is read as JSON,
    and stays text if it is none. What is not whole stays in the text that is returned.
    """
    schemas = {function["name"]: _properties(function) for function in map(_function, tools)}
    calls: list[ToolCall] = []

    def take(match: re.Match[str]) -> str:
        name, body = match[1].strip(), match[2]
        arguments = {key.strip(): value for key, value in _PARAMETER.findall(body)}
        if _PARAMETER.sub("", body).strip():
            return match[0]
        known = schemas.get(name, {})
        calls.append(ToolCall(name, {key: _typed(value, known.get(key)) for key, value in arguments.items()}))
        return ""

    return _CALL.sub(take, text).strip(), calls


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function", tool)
    assert isinstance(function, Mapping)
    return function


def _properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = (function.get("parameters") or {}).get("properties") or {}
    assert isinstance(properties, Mapping)
    return properties


def _typed(value: str, schema: Any) -> Any:
    if not isinstance(schema, Mapping) or schema.get("type", "string") == "string":
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
