"""Settings of answers that a chat can change."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.request import RequestOptions

KEYS: Mapping[str, type[int] | type[float]] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "prefill_chunk": int,
}
"""Options of ``Engine.generate`` with the types of their values."""
EXPERTS = "experts_k"
"""The setting that loads the model again."""


@dataclass
class Settings:
    """Settings of the answers of a chat.

    Attributes:
        options: values of ``KEYS`` that are not the default.
        thinking: whether the model thinks before it answers; None leaves it to the chat template.
        template_options: further variables of the chat template.
        folded: whether thinking is reduced to one line when it ends.
    """

    options: RequestOptions = field(default_factory=RequestOptions)
    thinking: bool | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    folded: bool = True

    def arguments(self) -> RequestOptions:
        """Return the settings as arguments of ``Engine.generate``."""
        return {**self.options, "enable_thinking": self.thinking, "template_options": self.template_options}

    def with_option(self, key: str, value: float | None) -> RequestOptions:
        """Return ``options`` with a changed value; None stands for the default."""
        changed: dict[str, Any] = {name: old for name, old in self.options.items() if name != key}
        if value is not None:
            changed[key] = value
        return cast(RequestOptions, changed)


def parse_setting(text: str) -> tuple[str, float | None]:
    """Return the key and the value in ``key=value``; the value ``null`` stands for the default.

    Raises:
        InputError: there is no such key (code "unknown_key"), or the value is not a number (code "invalid_value").
    """
    key, equals, written = (part.strip() for part in text.partition("="))
    kinds = {**KEYS, EXPERTS: int}
    if not equals or key not in kinds:
        raise InputError(f"/set {text}: give key=value; the keys are {', '.join(kinds)}", code="unknown_key")
    if written == "null":
        return key, None
    try:
        return key, kinds[key](written)
    except ValueError:
        kind = "a whole number" if kinds[key] is int else "a number"
        raise InputError(f"/set {key}={written}: must be {kind}, or null", code="invalid_value") from None
