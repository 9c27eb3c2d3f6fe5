"""Read files that came with a model, which are untrusted: every failure is an ``InputError`` that names the file."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from flashmoe_mlx.errors import InputError

_LARGEST_JSON = 64 * 2**20


def read_file(path: Path, limit: int) -> bytes | None:
    """Read the bytes of ``path``; return None if there is no such file.

    Raises:
        InputError: it is not a regular file, cannot be read, or is larger than ``limit`` bytes.
    """
    try:
        if not path.exists():
            return None
        if not path.is_file():
            raise InputError(f"{path} is not a regular file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > limit:
        raise InputError(f"{path} is larger than {limit} bytes", code="file_too_large")
    return data


def read_text(path: Path, limit: int) -> str | None:
    """Read the text of ``path``; return None if there is no such file.

    Raises:
        InputError: as ``read_file``, and if the file is not UTF-8.
    """
    data = read_file(path, limit)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start} is invalid", code="invalid_text") from error


def read_object(path: Path, *, strict: bool = False, limit: int = _LARGEST_JSON) -> dict[str, Any]:
    """Read the JSON object in ``path``; return an empty one if there is no such file.

    Args:
        path: the file.
        strict: refuse ``NaN``, ``Infinity`` and a byte order mark, as JSON does. Files that we write never hold them.
            Published configs hold the former, since Python writes and reads them, and editors add the latter: whoever
            takes a number from such a file must check its range.
        limit: largest size in bytes.

    Raises:
        InputError: as ``read_text``, and if the file holds anything but one JSON object.
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

    Duplicate keys are refused, since readers disagree on which one counts; with ``strict`` so are ``NaN``,
    infinities, and numbers too large for a float.

    Raises:
        ValueError: it is not one; the message says why and leaves out its subject.
    """
    constant, number = (_refuse_constant, _finite) if strict else (None, None)
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=constant, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"must hold a JSON object, not {type(value).__name__}")  # noqa: TRY004  # of the text, not of ours
    return value


def same_json(first: Any, second: Any) -> bool:
    """Whether two JSON values are equal, types included.

    For Python 1, 1.0 and true are equal and NaN differs from itself; here it is the other way round.
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
