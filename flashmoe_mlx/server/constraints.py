"""The fields that constrain an answer: ``response_format``, ``tool_choice`` and ``parallel_tool_calls``."""

from typing import Any

from flashmoe_mlx.server.errors import ApiError
from flashmoe_mlx.server.fields import Fields


def constraint_options(fields: Fields) -> dict[str, Any]:
    """Return the constraints as arguments of ``Engine.request``.

    Raises:
        ApiError: a field is wrong, or asks for what this engine cannot enforce.
    """
    options: dict[str, Any] = {}
    choice = fields.any("tool_choice")
    if choice not in (None, "auto", "none"):
        raise ApiError(
            "tool_choice: only 'auto' and 'none' are supported so far", code="unsupported", param="tool_choice"
        )
    response_format = fields.object("response_format")
    if response_format is not None and response_format.choice("type", "text", "json_object", "json_schema") not in (
        None,
        "text",
    ):
        raise ApiError("response_format: only 'text' is supported so far", code="unsupported", param="response_format")
    return options
