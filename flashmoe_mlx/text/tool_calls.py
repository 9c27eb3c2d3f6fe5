"""Tool calls in what a model writes, whole or token by token."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from flashmoe_mlx.text import tool_formats
from flashmoe_mlx.text.tags import END_TOOL_CALL, TOOL_CALL, Segment, TagScanner
from flashmoe_mlx.text.tool_formats.calls import CallDelta, FormatReader, Output, ToolCall
from flashmoe_mlx.text.tool_formats.schemas import ToolSchemas

__all__ = ["CallDelta", "Output", "ToolCall", "ToolCallReader", "parse_tool_calls"]


class ToolCallReader:
    """Separates calls from the rest of an answer as its tokens come.

    The outputs of ``add`` and ``finish``, joined, do not depend on where the text is cut into pieces.

    Args:
        tools: declarations as the chat template gets them; they decide the types of arguments.
        added_tokens: a tokenizer's added tokens. Where ``<tool_call>`` is a token, only the token opens a call, else
            its text does.
        tool_format: the name of a module in ``tool_formats``; ``Family.tool_format`` names the one of a model.
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
        """The calls found so far; the last may be incomplete."""
        return self._reader.calls

    def add(self, token_id: int | None, text: str) -> Output:
        """Take a token and the text that the detokenizer gave for it; None stands for text without tokens."""
        return self._reader.feed(self._scanner.add(token_id, text))

    def add_segments(self, segments: Sequence[Segment]) -> Output:
        """Take segments of ``ReasoningSplitter.split`` instead."""
        return self._reader.feed(segments)

    def finish(self) -> Output:
        """End the answer; returns what was held back."""
        return self._reader.finish("".join(segment.text for segment in self._scanner.finish()))


def parse_tool_calls(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> tuple[str, list[ToolCall]]:
    """Return what a model said besides its calls, and the calls, in order.

    ``text`` is an answer without its reasoning, ``tools`` are declarations as the chat template gets them. A value is
    read by its schema: as text for a string, otherwise as JSON or a Python literal; it stays text if it is neither.
    A call that the text ends in is among the calls, with ``complete`` false.
    """
    reader = ToolCallReader(tools)
    first, rest = reader.add(None, text), reader.finish()
    return first.content + rest.content, reader.calls
