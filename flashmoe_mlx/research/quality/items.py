"""Items for scoring a model: texts, and questions with expected answers.

An item is an object in a JSON Lines file. An item with ``text`` is a plain text, whose perplexity is measured. Any
other item is a question: ``messages`` (and ``tools``) are the prompt, and ``answer`` is a correct answer. At most one
of these fields states how an answer is judged:

- ``exact``: the answer must equal this text.
- ``schema`` with ``json``: the answer must be JSON that satisfies the schema and equals this value.
- ``call``: the answer must be one tool call with this ``name`` and these ``arguments``.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from types import ModuleType
from typing import Any

from flashmoe_mlx.errors import InputError, missing_extra
from flashmoe_mlx.formats.untrusted import read_text, same_json
from flashmoe_mlx.text.tool_calls import parse_tool_calls

_LARGEST_ITEMS = 64 * 2**20
_INVALID = "invalid_items"


@dataclass(frozen=True)
class Item:
    """A text or a question; the docstring of the module describes the fields."""

    kind: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    answer: str = ""
    exact: str | None = None
    schema: Mapping[str, Any] | None = None
    json: Any = None
    call: Mapping[str, Any] | None = None

    @property
    def judged(self) -> bool:
        """Whether answers to this item can be judged."""
        return self.exact is not None or self.constrainable

    @property
    def constrainable(self) -> bool:
        """Whether a constraint can enforce the form of the answer."""
        return self.schema is not None or self.call is not None


def shipped_items() -> Path:
    """Return the path of the held-out items of the demo model, which are part of the package."""
    return Path(str(package_files("flashmoe_mlx.made_models").joinpath("demo_model", "held_out.jsonl")))


def load_items(path: Path, kinds: Sequence[str] | None = None, limit: int | None = None) -> list[Item]:
    """Read items from a JSON Lines file.

    Args:
        path: the file.
        kinds: kinds of items to keep; None for all.
        limit: largest number of items to keep of each kind; None for all.

    Raises:
        InputError: the file does not exist (code "missing_items"), a line is not an item or no item is left
            ("invalid_items"), or a kind does not occur ("unknown_kind").
    """
    text = read_text(path, _LARGEST_ITEMS)
    if text is None:
        raise InputError(f"{path}: no such file", code="missing_items")
    items = [_parse_item(line, f"{path}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    present = sorted({item.kind for item in items})
    for kind in kinds or ():
        if kind not in present:
            raise InputError(
                f"{path}: no items of kind {kind}; the kinds are {', '.join(present)}", code="unknown_kind"
            )
    chosen: list[Item] = []
    counts: dict[str, int] = {}
    for item in items:
        counts[item.kind] = counts.get(item.kind, 0) + 1
        if (kinds is None or item.kind in kinds) and (limit is None or counts[item.kind] <= limit):
            chosen.append(item)
    if not chosen:
        raise InputError(f"{path}: no items", code=_INVALID)
    return chosen


_FIELDS = {
    "kind": str,
    "text": str,
    "messages": list,
    "tools": list,
    "answer": str,
    "exact": str,
    "schema": dict,
    "call": dict,
}


def _jsonschema() -> ModuleType:
    """Import the package that checks answers against schemas, which the extra ``evaluate`` installs.

    Raises:
        InputError: it is not installed (code "missing_extra").
    """
    try:
        return importlib.import_module("jsonschema")
    except ImportError:
        raise missing_extra("an item with a schema", "evaluate") from None


def _parse_item(line: str, where: str) -> Item:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}", code=_INVALID) from error
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        raise InputError(f"{where}: not an object with a kind", code=_INVALID)
    for name, value in values.items():
        if name != "json" and (name not in _FIELDS or not isinstance(value, _FIELDS[name])):
            raise InputError(f"{where}: {name} is unknown or has the wrong type", code=_INVALID)
    if ("text" in values) == ("messages" in values) or ("messages" in values) != ("answer" in values):
        raise InputError(f"{where}: must have either text, or messages and answer", code=_INVALID)
    if "schema" in values:
        jsonschema = _jsonschema()
        try:
            jsonschema.Draft202012Validator.check_schema(values["schema"])
        except jsonschema.SchemaError as error:
            raise InputError(f"{where}: schema: {error.message}", code=_INVALID) from error
    for name in ("messages", "tools"):
        values[name] = tuple(values.get(name, ()))
    return Item(**values)


@dataclass(frozen=True)
class Answer:
    """A model's answer to an item, and its judgment.

    Attributes:
        item: the question.
        text: the answer.
        correct: whether the answer is correct.
        parsed: whether the answer is JSON; None for an item without a schema.
        valid: whether that JSON satisfies the schema; None for an item without a schema.
    """

    item: Item
    text: str
    correct: bool
    parsed: bool | None = None
    valid: bool | None = None


def judge(item: Item, text: str, tool_format: str = "qwen_xml") -> Answer:
    """Judge ``text`` as an answer to ``item``, which must be a judged item; calls have the format ``tool_format``."""
    if item.exact is not None:
        return Answer(item, text, text == item.exact)
    if item.call is not None:
        rest, calls = parse_tool_calls(text, item.tools, tool_format)
        made = [{"name": call.name, "arguments": call.arguments} for call in calls if call.complete]
        return Answer(item, text, not rest and made == [item.call])
    assert item.schema is not None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Answer(item, text, False, parsed=False, valid=False)
    valid = _jsonschema().Draft202012Validator(item.schema).is_valid(value)
    return Answer(item, text, valid and same_json(value, item.json), parsed=True, valid=valid)
