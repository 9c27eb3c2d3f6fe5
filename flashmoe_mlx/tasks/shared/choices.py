"""Check of keys whose values are lists."""

from collections.abc import Collection, Sequence
from typing import Any

from flashmoe_mlx.errors import InputError


def check_choices(key: str, values: Sequence[Any] | None, choices: Collection[Any] | None = None) -> None:
    """Check the list ``values`` of ``key``; None, for a key that is not set, is valid.

    Raises:
        InputError: the list is empty, repeats a value, or has a value that is not in ``choices``.
    """
    if values is None:
        return
    shown = f"{key}=[{','.join(map(str, values))}]"
    if choices is not None and (not values or any(value not in choices for value in values)):
        raise InputError(f"{shown}: choose from {', '.join(map(str, choices))}", code="unknown_choice")
    if not values:
        raise InputError(f"{shown}: name at least one value", code="empty_list")
    if len(set(values)) < len(values):
        raise InputError(f"{shown}: a value is repeated", code="repeated_value")
