"""Checks of keys whose values are lists."""

from collections.abc import Collection, Sequence
from typing import Any

from flashmoe_mlx.errors import InputError


def check_choices(key: str, values: Sequence[Any] | None, choices: Collection[Any] | None = None) -> None:
    """Refuse a list that is empty, repeats a value, or has one that is not among ``choices``.

    Raises:
        InputError: such a list; None, for a key that is not set, passes.
    """
    if values is None:
        return
    shown = f"{key}=[{','.join(map(str, values))}]"
    if choices is not None and (not values or any(value not in choices for value in values)):
        raise InputError(f"{shown}: choose from {', '.join(map(str, choices))}", code="unknown_choice")
    if not values:
        raise InputError(f"{shown}: name at least one", code="empty_list")
    if len(set(values)) < len(values):
        raise InputError(f"{shown}: has a value twice", code="repeated_value")
