"""Find a model's chat template, and its special tokens, in the published files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.untrusted import read_object, read_text

LARGEST_TEMPLATE = 2**20

_DEFAULT, _TOOL_USE = "default", "tool_use"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class PublishedTemplate:
    """The source of a model's chat template.

    Attributes:
        source: Jinja source of the template.
        tool_source: source of the template for conversations with tools; None if it is the same.
        special_tokens: texts of special tokens by name, such as "eos_token".
    """

    source: str
    tool_source: str | None
    special_tokens: dict[str, str]


def find_template(folder: Path) -> PublishedTemplate | None:
    """Read the template published in ``folder``; return None if there is none.

    The sources in order of precedence are ``chat_template.jinja``, ``chat_template.json`` (written by processors of
    vision models), and the field "chat_template" of ``tokenizer_config.json``. A template named "tool_use" is for
    conversations with tools.

    Raises:
        InputError: a file is malformed or too large.
    """
    config_path, json_path = folder / "tokenizer_config.json", folder / "chat_template.json"
    config = read_object(config_path)
    source = read_text(folder / "chat_template.jinja", LARGEST_TEMPLATE)
    if source is not None:
        tool_source = read_text(folder / "additional_chat_templates" / f"{_TOOL_USE}.jinja", LARGEST_TEMPLATE)
        named = {_DEFAULT: source} | ({_TOOL_USE: tool_source} if tool_source is not None else {})
    else:
        named = _named_templates(read_object(json_path).get("chat_template"), json_path) or _named_templates(
            config.get("chat_template"), config_path
        )
    if not named:
        return None
    return PublishedTemplate(named[_DEFAULT], named.get(_TOOL_USE), _special_tokens(config, config_path))


def _named_templates(value: object, path: Path) -> dict[str, str]:
    """Return templates by name from a field "chat_template": one string, or a list of named templates."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {_DEFAULT: value}
    named: dict[str, str] = {}
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise InputError(
                f'{path}: chat_template must be a string, or a list of {{"name": ..., "template": ...}}',
                code="invalid_template",
            )
        named[entry["name"]] = entry["template"]
    if _DEFAULT not in named:
        raise InputError(f"{path}: chat_template: no template is named 'default'", code="invalid_template")
    return named


def _special_tokens(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Return the special tokens in a ``tokenizer_config.json``: bos_token and so on, and tokens that the model adds."""
    added = (config.get(name) for name in ("extra_special_tokens", "model_specific_special_tokens"))
    named = {name: token for tokens in added if isinstance(tokens, dict) for name, token in tokens.items()}
    named |= {name: token for name, token in config.items() if name.endswith("_token")}
    tokens = {}
    for name, token in named.items():
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            tokens[name] = text
        elif name in SPECIAL_TOKENS and token is not None:
            raise InputError(f"{path}: {name} is not the text of a token", code="invalid_tokenizer")
    return tokens
