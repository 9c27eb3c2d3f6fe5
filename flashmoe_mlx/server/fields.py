"""Validation of the bodies of requests: every error names the field.

Unknown fields are ignored, since clients send new fields before servers know them. Numbers have ranges, and true is not
1.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

from flashmoe_mlx.server.errors import ApiError

_MOST_DIGITS = 32
_DEEPEST = 128
_MOST_VALUES = 2**20
"""Values in a body, each of which takes a hundred times the memory of its text."""
_MOST_CONTAINERS = 2**18
"""Lists and objects in a body; the parser makes them without letting other threads run."""


def parse_body(body: bytes) -> dict[str, Any]:
    """Parse a body as a JSON object.

    Raises:
        ApiError: it is not one; status 400.
    """
    containers = body.count(b"[") + body.count(b"{")
    if containers > _MOST_CONTAINERS or containers + body.count(b",") > _MOST_VALUES:
        raise ApiError(
            f"the body has more than {_MOST_VALUES:,} values, or more than {_MOST_CONTAINERS:,} lists and objects",
            status=413,
            code="body_too_large",
        )
    try:
        text = body.decode()
        content = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
        text.encode()
        _check_values(content)
    except RecursionError:
        raise ApiError(f"the body is nested more than {_DEEPEST} levels deep", code="invalid_body") from None
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {_short(str(error))}", code="invalid_body") from None
    if not isinstance(content, dict):
        raise ApiError("the body must be a JSON object", code="invalid_body")
    return content


def _check_values(content: Any) -> None:
    """Refuse deep nesting, and halves of surrogate pairs, which no tokenizer takes."""
    level = [content]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                value.encode()
            elif isinstance(value, dict):
                "".join(value).encode()
                below += value.values()
            elif isinstance(value, list):
                below += value
        if not below:
            return
        level = below
    raise RecursionError


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; programs disagree on which of two equal keys counts."""
    content = dict(pairs)
    if len(content) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {name[:80]!r} occurs twice in an object")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError("a number has too many digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


def _short(text: str) -> str:
    return ascii(text)[1:-1][:200]


def refuse(place: str, reason: str, code: str = "invalid_value") -> NoReturn:
    """Raise the error of a field with a wrong value."""
    raise ApiError(f"{place} {reason}", code=code, param=place)


class Fields:
    """The fields of a JSON object in a request; null stands for an absent field.

    Args:
        content: the object.
        place: its place in the body, such as ``tools[0].``; empty for the body.
    """

    def __init__(self, content: Any, place: str = "") -> None:
        if not isinstance(content, Mapping):
            refuse(place.rstrip("."), "must be an object")
        self.content: Mapping[str, Any] = content
        self.place = place

    def __contains__(self, name: str) -> bool:
        return self.content.get(name) is not None

    def any(self, name: str) -> Any:
        """Return the value of a field as it is."""
        return self.content.get(name)

    def refuse(self, name: str, reason: str, code: str = "invalid_value") -> NoReturn:
        """Raise the error of a field with a wrong value."""
        refuse(self.place + name, reason, code)

    def text(self, name: str, most: int | None = None) -> str | None:
        """Return a text of at most ``most`` characters."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, str):
            self.refuse(name, "must be a string")
        if value is not None and most is not None and len(value) > most:
            self.refuse(name, f"must have at most {most} characters")
        return value

    def required_text(self, name: str, most: int | None = None) -> str:
        """Return a text that is present and not empty."""
        value = self.text(name, most)
        if not value:
            self.refuse(name, "is required: a string that is not empty", code="missing_field")
        return value

    def choice(self, name: str, *choices: str) -> str | None:
        """Return a text that is one of ``choices``."""
        value = self.content.get(name)
        if value is not None and value not in choices:
            self.refuse(name, f"must be one of {', '.join(choices)}")
        return None if value is None else str(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a boolean."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "must be true or false")
        return default if value is None else value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """Return a whole number from ``low`` to ``high``."""
        value = self.content.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (type(value) is not int or not low <= value <= high):
            self.refuse(name, f"must be a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """Return a number from ``low`` to ``high``."""
        value = self.content.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.refuse(name, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def object(self, name: str) -> "Fields | None":
        """Return the fields of an object."""
        value = self.content.get(name)
        return None if value is None else Fields(value, f"{self.place}{name}.")

    def items(self, name: str, most: int) -> list[Any] | None:
        """Return a list of at most ``most`` items."""
        value = self.content.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            self.refuse(name, "must be a list")
        if len(value) > most:
            self.refuse(name, f"must have at most {most} items, not {len(value)}")
        return value

    def objects(self, name: str, most: int) -> "list[Fields] | None":
        """Return the fields of each object in a list."""
        items = self.items(name, most)
        if items is None:
            return None
        return [Fields(item, f"{self.place}{name}[{index}].") for index, item in enumerate(items)]
