"""Reading files that came with a model, which are untrusted: every failure is an ``InputError`` that names the file."""

import json
from pathlib import Path
from typing import Any, NoReturn

from flashmoe_mlx.errors import InputError

_LARGEST_JSON = 64 * 2**20


def read_file(path: Path, limit: int) -> bytes | None:
    """The bytes of ``path``, or None if there is no such file.

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
        raise InputError(f"{path} is larger than {limit} bytes")
    return data


def read_text(path: Path, limit: int) -> str | None:
    """The text of ``path``, or None if there is no such file; raises as ``read_file`` does, and if it is not UTF-8."""
    data = read_file(path, limit)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start} is invalid") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, empty if there is no such file; raises as ``read_text`` does, and for other JSON."""
    text = read_text(path, _LARGEST_JSON)
    if text is None:
        return {}
    try:
        return parse_object(text)
    except ValueError as error:
        raise InputError(f"{path} {error}") from error


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object that ``text`` is.

    Duplicate keys, NaN and infinities are refused: readers disagree on what they mean.

    Raises:
        ValueError: it is not one; the message says why, its subject left out.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"must hold a JSON object, not {type(value).__name__}")  # noqa: TRY004  # of the text, not of ours
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
