"""Tool calls in the form of the API: complete calls, and pieces of calls while a model writes them."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from flashmoe_mlx.text.tags import Segment

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(slots=True)
class ToolCall:
    """A call of the function ``name`` with ``arguments``, which are JSON values.

    ``complete`` is False if the output ended inside the call. The arguments are then those received so far, and a
    string among them may be cut off.
    """

    name: str
    arguments: dict[str, Any]
    complete: bool = True


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a call.

    The concatenated ``arguments`` of all pieces with the same ``index`` are the JSON text of the arguments, or a prefix
    of it if the output ended inside the call. Only the first piece of a call has a ``name``.
    """

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Output:
    """The result of one step of a reader: text of the answer, and pieces of calls in order."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class FormatReader(Protocol):
    """A reader of answers in one format; the module of a format defines it as ``READER``, made from ``ToolSchemas``."""

    calls: list[ToolCall]

    def add(self, segments: Iterable[Segment]) -> Output:
        """Read the next segments of the answer and return the output that is now certain."""
        ...

    def finish(self, rest: str = "") -> Output:
        """End the answer with ``rest`` and return the output that was held back."""
        ...


def json_text(value: Any) -> str:
    """Return the JSON of ``value`` with lone surrogates escaped, so that it can be encoded as UTF-8."""
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))
