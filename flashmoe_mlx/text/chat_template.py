"""Chat templates: a model's own Jinja text that turns messages into a prompt.

A template is foreign code. It runs in Jinja's sandbox and sees nothing but plain data; its size, its output and any
single product or power are bounded. Its running time, and the memory that its loops build up, are not.

Variables, filters and functions are those of ``transformers`` ``apply_chat_template``, so that both render alike.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.untrusted import read_object, read_text

_LARGEST_TEMPLATE = 2**20
_LARGEST_OUTPUT = 2**25
"""Characters of a prompt, items of a repeated sequence, bits of a product or power."""
_LONGEST_REASON = 300

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A model's chat template, compiled.

    ``special_tokens`` are variables of the template, such as ``{"eos_token": "<|im_end|>"}``.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source.encode(errors="replace")) > _LARGEST_TEMPLATE:
            raise InputError(f"chat template: larger than {_LARGEST_TEMPLATE} bytes")
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _Environment().from_string(source)
        except Exception as error:
            raise _failure(error) from error

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate | None":
        """The template published in ``folder``, or None if there is none.

        ``chat_template.jinja`` goes before the "chat_template" of ``tokenizer_config.json``.

        Raises:
            InputError: a file is malformed or too large, or the template is not valid.
        """
        config_path = folder / "tokenizer_config.json"
        config = read_object(config_path)
        source = read_text(folder / "chat_template.jinja", _LARGEST_TEMPLATE)
        if source is None:
            source = _configured_template(config.get("chat_template"), config_path)
        return None if source is None else cls(source, _special_tokens(config, config_path))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """The prompt for ``messages``; ``options`` are further variables of the template, such as ``enable_thinking``.

        Raises:
            InputError: ``messages`` is empty or holds other than JSON values, or the template fails, refuses the
                messages, or writes too much.
        """
        try:
            variables = {
                "documents": None,
                **self._special_tokens,
                **_plain(options),
                "messages": _plain_messages(messages),
                "tools": None if tools is None else _plain(tools),
                "add_generation_prompt": bool(add_generation_prompt),
            }
            pieces, length = [], 0
            for piece in self._template.generate(variables):
                length += len(piece)
                if length > _LARGEST_OUTPUT:
                    raise InputError(f"chat template: it writes more than {_LARGEST_OUTPUT} characters")
                pieces.append(piece)
        except InputError:
            raise
        except Exception as error:
            raise _failure(error) from error
        return "".join(pieces)


class _Generation(Extension):
    """``{% generation %}``, which marks the model's words for training; here its body is rendered and no more."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _size(operator, left, right) > _LARGEST_OUTPUT:
            raise SecurityError(f"the result of {operator!r} is too large")
        return super().call_binop(context, operator, left, right)


class _Dict:
    """Stands in for ``dict``, whose unbound methods would get around the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Refuses names that Python or Jinja itself would look up on the object."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _size(operator: str, left: Any, right: Any) -> int:
    """Items, or bits of an integer, that ``left operator right`` will have; 0 where it cannot be large."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
    if isinstance(left, int):
        left, right = right, left
    if isinstance(left, str | list | tuple) and isinstance(right, int):
        return len(left) * right
    return 0


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _failure(error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    if isinstance(error, TemplateSyntaxError):
        reason = f"line {error.lineno}: {' '.join((error.message or '').split())}"
    elif not isinstance(error, TemplateError) or not reason:
        reason = f"{type(error).__name__}: {reason}"
    if len(reason) > _LONGEST_REASON:
        reason = reason[:_LONGEST_REASON] + "..."
    return InputError(f"chat template: {reason}")


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies without the fields that are None, and with the model's reasoning under the names that templates read."""
    if not messages:
        raise InputError("there are no messages to render")
    plain = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise InputError(f"a message must be an object with a role and a content, not {type(message).__name__}")
        fields = {name: _plain(value) for name, value in message.items() if value is not None}
        reasoning = next((fields[name] for name in _REASONING_FIELDS if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        plain.append(fields)
    return plain


def _plain(value: Any) -> Any:
    """A copy made of JSON types alone: the methods of anything richer would be open to the template."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(item) for item in value]
    raise InputError(f"a chat template can be given JSON values only, not {type(value).__name__}")


def _configured_template(value: object, path: Path) -> str | None:
    """The "chat_template" of a ``tokenizer_config.json``: a string, or a list of named ones with a default."""
    if value is None or isinstance(value, str):
        return value
    named: dict[str, str] = {}
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise InputError(f'{path}: chat_template must be a string, or a list of {{"name": ..., "template": ...}}')
        named[entry["name"]] = entry["template"]
    if "default" not in named:
        raise InputError(f"{path}: none of its chat templates is named 'default'")
    return named["default"]


def _special_tokens(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The named tokens of a ``tokenizer_config.json``: bos_token and its like, and those that a model has added."""
    added = (config.get(name) for name in ("extra_special_tokens", "model_specific_special_tokens"))
    named = {name: token for tokens in added if isinstance(tokens, dict) for name, token in tokens.items()}
    named |= {name: token for name, token in config.items() if name.endswith("_token")}
    tokens = {}
    for name, token in named.items():
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            tokens[name] = text
        elif name in _SPECIAL_TOKENS and token is not None:
            raise InputError(f"{path}: {name} is not a token")
    return tokens
