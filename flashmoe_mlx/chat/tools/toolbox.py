"""Tools that a model may call, and the form in which their results reach it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, Self

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.prompting import checked_tools

_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\|\Z)|[ -/]*[0-~])", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
INTERRUPTED = "not finished: the user interrupted it"
"""The result of a call that was interrupted."""


class ToolCallError(Exception):
    """The failure of a call, which the model gets as the result."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        declaration: the function in the form of the OpenAI API.
        origin: a description of the place that the function comes from, for people.
        run: runs the function with JSON arguments and returns its result; raises ``ToolCallError``, or
            ``KeyboardInterrupt`` after it has stopped the call.
    """

    declaration: Mapping[str, Any]
    origin: str
    run: Callable[[Mapping[str, Any]], str]

    @property
    def name(self) -> str:
        """The name by which the model calls the function."""
        return str(self.declaration["function"]["name"])

    @property
    def about(self) -> str:
        """The first line of the description."""
        return str(self.declaration["function"].get("description") or "").partition("\n")[0]


class ToolSource(Protocol):
    """A place that tools come from; closing it ends its processes."""

    @property
    def tools(self) -> Sequence[Tool]:
        """The tools."""
        ...

    def close(self) -> None:
        """End the processes of the source."""
        ...


class Toolbox:
    """All tools of a chat; close it, or use it as a context manager.

    Args:
        allowed: names of tools that run without a question.

    Attributes:
        tools: the tools by name.
        allowed: names of tools that run without a question; consent for "always" adds a name.
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self.tools: dict[str, Tool] = {}
        self.allowed: set[str] = set(allowed)
        self._sources = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, source: ToolSource) -> None:
        """Add the tools of ``source``, which is closed with the toolbox.

        Raises:
            InputError: a declaration is malformed, or two tools have the same name; code "invalid_tools".
        """
        self._sources.callback(source.close)
        for tool in source.tools:
            checked_tools([tool.declaration], tool.origin)
            if tool.name in self.tools:
                raise InputError(
                    f"two tools are named {tool.name!r}: in {self.tools[tool.name].origin} and in {tool.origin}",
                    code="invalid_tools",
                )
            self.tools[tool.name] = tool

    def check_allowed(self) -> None:
        """Check that every name in ``allowed`` is a tool.

        Raises:
            InputError: a name is unknown; code "unknown_tool".
        """
        if unknown := sorted(self.allowed - self.tools.keys()):
            known = ", ".join(self.tools) or "none"
            raise InputError(
                f"tools.allow: no tool is named {unknown[0]!r}; the tools are {known}", code="unknown_tool"
            )

    @property
    def declarations(self) -> list[Mapping[str, Any]] | None:
        """The declarations of all tools, for a prompt; None without tools."""
        return [tool.declaration for tool in self.tools.values()] or None

    def close(self) -> None:
        """End the processes of all sources."""
        self._sources.close()


def declared(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the declaration of a function in the form of the OpenAI API."""
    function = {"name": name, "description": description, "parameters": dict(parameters)}
    return {"type": "function", "function": function}


def clean_result(text: str, limit: int) -> str:
    """Return the result ``text`` of a tool as plain data: without escape sequences and control characters.

    At most ``limit`` characters are kept.
    """
    text = _CONTROL.sub("", _ESCAPE_SEQUENCE.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))
    if len(text) <= limit:
        return text
    return f"{text[:limit]}\n[{len(text) - limit:,} more characters were left out]"
