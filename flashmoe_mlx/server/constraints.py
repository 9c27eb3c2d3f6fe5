"""The fields that constrain an answer: ``response_format``, ``tool_choice`` and ``parallel_tool_calls``."""

from collections.abc import Sequence
from typing import Any

from flashmoe_mlx.server.conversation import MOST_TOOLS
from flashmoe_mlx.server.fields import Fields
from flashmoe_mlx.server.options import check_size


def constraint_options(fields: Fields, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the constraints as arguments of ``Engine.request``.

    Raises:
        ApiError: a field is wrong.
    """
    options: dict[str, Any] = format_options(fields)
    choice, _ = _tool_choice(fields)
    if choice not in ("auto", "none") and not tools:
        fields.refuse("tool_choice", "needs tools")
    if tools and choice != "none":
        options["tool_choice"] = choice
        if not fields.flag("parallel_tool_calls", default=True):
            options["parallel_tool_calls"] = False
    return options


def format_options(fields: Fields) -> dict[str, Any]:
    """Return the constraint that ``response_format`` asks for."""
    asked = fields.object("response_format")
    if asked is None:
        return {}
    kind = asked.choice("type", "text", "json_object", "json_schema")
    if kind is None:
        asked.refuse("type", "is required", code="missing_field")
    inside = asked.object("json_schema") if kind == "json_schema" else None
    schema = (inside or asked).any("schema")  # llama.cpp takes a schema beside the type
    if kind == "text" or (kind == "json_object" and schema is None):
        return {"json_object": True} if kind == "json_object" else {}
    if not isinstance(schema, dict):
        (inside or asked).refuse("schema", "is required: a JSON schema, which is an object", code="missing_field")
    check_size(schema, f"{(inside or asked).place}schema")
    return {"schema": schema}


def offered_tools(fields: Fields, tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the part of ``tools``, in the form of the chat API, that ``tool_choice`` lets the model see.

    Raises:
        ApiError: ``tool_choice`` is wrong.
    """
    choice, allowed = _tool_choice(fields)
    if choice == "none":
        return []
    return [tool for tool in tools if allowed is None or _name(tool) in allowed]


def _name(tool: dict[str, Any]) -> Any:
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else None


def _tool_choice(fields: Fields) -> tuple[str | dict[str, str], list[str] | None]:
    """Return the choice, and the names of the allowed functions, None for all.

    The chat API has the fields of a choice in an object of its type, the Responses API beside the type.
    """
    given = fields.any("tool_choice")
    if not isinstance(given, dict):
        return fields.choice("tool_choice", "auto", "none", "required") or "auto", None
    choice = Fields(given, "tool_choice.")
    kind = choice.choice("type", "function", "allowed_tools") or "function"
    inside = choice.object(kind) or choice
    if kind == "function":
        return {"name": inside.required_text("name", 256)}, None
    tools = inside.objects("tools", MOST_TOOLS) or []
    names = [(tool.object("function") or tool).required_text("name", 256) for tool in tools]
    return inside.choice("mode", "auto", "required") or "auto", names
