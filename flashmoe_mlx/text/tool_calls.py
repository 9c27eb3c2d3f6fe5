"""Read tool calls in the output of a model, as a whole or token by token."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from flashmoe_mlx.text import tool_formats
from flashmoe_mlx.text.tags import END_TOOL_CALL, TOOL_CALL, Segment, TagScanner
from flashmoe_mlx.text.tool_formats.calls import CallDelta, FormatReader, Output, ToolCall
from flashmoe_mlx.text.tool_formats.schemas import ToolSchemas

__all__ = ["CallDelta", "Output", "ToolCall", "ToolCallReader", "parse_tool_calls"]


class ToolCallReader:
    """An incremental reader that separates tool calls from the rest of an answer.

    The concatenated outputs of ``add`` and ``finish`` do not depend on how the text is divided into tokens.

    Args:
        tools: declarations, as for the chat template; they determine the types of arguments.
        added_tokens: ids of a tokenizer's added tokens by their text. If ``<tool_call>`` is among them, only this token
            begins a call, otherwise its text does.
        tool_format: the name of a module in ``tool_formats``; ``Engine.tool_format`` names the one of a model.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        added_tokens: Mapping[str, int] | None = None,
        tool_format: str = "qwen_xml",
    ) -> None:
        self._scanner = TagScanner(added_tokens or {}, (TOOL_CALL, END_TOOL_CALL))
        module = import_module(f"{tool_formats.__name__}.{tool_format}")
        self._reader: FormatReader = module.READER(ToolSchemas(tools))

    @property
    def calls(self) -> list[ToolCall]:
        """The calls read so far; the last call may be incomplete."""
        return self._reader.calls

    def add(self, token_id: int | None, text: str) -> Output:
        """Add a token and the text that it completed; ``token_id`` is None for text that does not come from a token."""
        return self._reader.add(self._scanner.add(token_id, text))

    def add_segments(self, segments: Sequence[Segment]) -> Output:
        """Add segments from ``ReasoningSplitter.split``, instead of a token."""
        return self._reader.add(segments)

    def finish(self) -> Output:
        """End the answer and return the output that was held back."""
        return self._reader.finish("".join(segment.text for segment in self._scanner.finish()))


def parse_tool_calls(
    text: str, tools: Sequence[Mapping[str, Any]] | None = None, tool_format: str = "qwen_xml"
) -> tuple[str, list[ToolCall]]:
    """Return the text of an answer without its tool calls, and the calls in order.

    A value is read according to its schema: as text for a string, otherwise as JSON or a Python literal; a value that
    is neither stays text. If the text ends inside a call, the call is included with ``complete`` set to False.

    Args:
        text: answer without reasoning.
        tools: declarations, as for the chat template.
        tool_format: the name of a module in ``tool_formats``.
    """
    reader = ToolCallReader(tools, tool_format=tool_format)
    first, rest = reader.add(None, text), reader.finish()
    return first.content + rest.content, reader.calls
