"""Tool calls as programs read them: whole, and in pieces while a model writes them."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from flashmoe_mlx.text.tags import Segment

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(slots=True)
class ToolCall:
    """A function's name and its arguments as JSON values."""

    name: str
    arguments: dict[str, Any]
    complete: bool = True
    """False if the output ended inside the call; ``arguments`` then holds what came, perhaps half a string."""


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a call.

    The ``arguments`` of all pieces of one ``index``, joined, are the JSON text of the arguments, or a prefix of it if
    the output ended inside the call. Only the first piece of a call has a ``name``.
    """

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Output:
    """What one step of reading made certain: text of the answer, and pieces of calls in order."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class FormatReader(Protocol):
    """Reads an answer in one format; the module of a format names its reader ``READER``, made from ``ToolSchemas``."""

    calls: list[ToolCall]

    def feed(self, segments: Iterable[Segment]) -> Output:
        """Read the next segments of the answer and return the output that is now certain."""
        ...

    def finish(self, rest: str = "") -> Output:
        """End the answer with ``rest`` and return the output that was held back."""
        ...


def json_text(value: Any) -> str:
    """JSON of ``value`` that can be encoded as UTF-8: lone surrogates are escaped."""
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))
