"""Reading of files that came with a model and are untrusted: every failure is an ``InputError`` that names the file."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from flashmoe_mlx.errors import InputError

_MAX_JSON_BYTES = 64 * 2**20


def read_file(path: Path, limit: int) -> bytes | None:
    """Read the bytes of ``path``; return None if there is no such file.

    Raises:
        InputError: it is not a regular file (code "not_a_file"), cannot be read ("cannot_read_file"), or is larger than
            ``limit`` bytes ("file_too_large").
    """
    try:
        if not path.exists():
            return None
        if not path.is_file():
            raise InputError(f"{path} is not a regular file", code="not_a_file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", code="cannot_read_file") from error
    if len(data) > limit:
        raise InputError(f"{path} is larger than {limit} bytes", code="file_too_large")
    return data


def read_text(path: Path, limit: int) -> str | None:
    """Read the text of ``path``; return None if there is no such file.

    Raises:
        InputError: as for ``read_file``, or the file is not UTF-8 (code "invalid_text").
    """
    data = read_file(path, limit)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start} is invalid", code="invalid_text") from error


def read_object(path: Path, *, strict: bool = False, limit: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Read the JSON object in ``path``; return an empty one if there is no such file.

    Args:
        path: the file.
        strict: whether to refuse ``NaN``, ``Infinity``, and a byte order mark, as JSON does. Files of this package
            never hold them. Published configs may: Python writes ``NaN``, and editors add the mark. Check the range
            of every number that comes from a file read without ``strict``.
        limit: maximum size in bytes.

    Raises:
        InputError: as for ``read_text``, or the file does not hold exactly one JSON object (code "invalid_json").
    """
    text = read_text(path, limit)
    if text is None:
        return {}
    try:
        return parse_object(text if strict else text.removeprefix("\ufeff"), strict=strict)
    except ValueError as error:
        raise InputError(f"{path} {error}", code="invalid_json") from error


def parse_object(text: str, *, strict: bool = True) -> dict[str, Any]:
    """Parse ``text`` as one JSON object.

    Duplicate keys are refused, because JSON readers disagree on which of them counts. ``strict`` also refuses ``NaN``,
    infinities, and numbers too large for a float.

    Raises:
        ValueError: ``text`` is not one valid JSON object; the message is a predicate without a subject, such as "is not
            valid JSON: ...".
    """
    constant, number = (_refuse_constant, _finite) if strict else (None, None)
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=constant, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"must hold a JSON object, not {type(value).__name__}")  # noqa: TRY004  # the type in the text, not of an argument
    return value


def same_json(first: Any, second: Any) -> bool:
    """Return whether two JSON values are equal, including their types.

    Python's ``==`` calls 1, 1.0, and true equal and NaN different from itself; this function does the opposite.
    """
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"a key occurs twice in one object: {ascii(key)[:80]}")
        found[key] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value
