"""Chat templates: Jinja templates, published with a model, that turn messages into a prompt.

A template is untrusted code. It runs in Jinja's sandbox and receives JSON values only. The size of the template, the
size of its output, and the size of each product and power are limited; its running time and the memory used by its
loops are not.

Variables, filters and functions are those of ``apply_chat_template`` in ``transformers``, so that both render the same
prompt.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.text.messages import (
    find_non_text_content,
    find_unusual_role,
    join_text_parts,
    normalize_messages,
    to_json_types,
)
from flashmoe_mlx.text.template_files import LARGEST_TEMPLATE, SPECIAL_TOKENS, find_template
from flashmoe_mlx.text.tool_formats.by_template import format_of_template

_LARGEST_OUTPUT = 2**25
"""Limit for the characters of a prompt, the items of a repeated sequence, and the bits of a product or power."""
_LONGEST_REASON = 300
_TAKES_JSON_TEXT = re.compile(r"\barguments\s+is\s+(?:not\s+)?string\b")
_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatTemplate:
    """The compiled chat template of a model.

    Args:
        source: Jinja source of the template.
        special_tokens: variables of the template, such as ``{"eos_token": "<|im_end|>"}``.
        tool_source: source of the template for conversations with tools; None if it is the same.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], tool_source: str | None = None) -> None:
        self.source = source
        self._tool_source = tool_source or source
        self._special_tokens = dict(special_tokens)
        self._template = _Compiled(source)
        self._tool_template = self._template if tool_source is None else _Compiled(tool_source)

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate | None":
        """Return the template published in ``folder``; None if there is none. See ``find_template``.

        Raises:
            InputError: a file is malformed or too large, or the template is invalid.
        """
        found = find_template(folder)
        return None if found is None else cls(found.source, found.special_tokens, found.tool_source)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The optional variables of the template, such as ``enable_thinking`` and ``reasoning_effort``."""
        return self._read - _GIVEN - self._special_tokens.keys() - set(SPECIAL_TOKENS)

    @cached_property
    def tool_format(self) -> str | None:
        """The name of the module in ``tool_formats`` for the calls that the template writes; None if none is known."""
        return format_of_template(self._tool_source)

    def reads(self, name: str) -> bool:
        """Tell whether the template reads the variable ``name``, whether optional or always given."""
        return name in self._read

    @cached_property
    def _read(self) -> frozenset[str]:
        return self._template.variables() | self._tool_template.variables()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """Return the prompt for ``messages``.

        Args:
            messages: messages in the form of the OpenAI API. Arguments of tool calls may be JSON text. Contents may be
                lists of parts; text parts are joined if the template does not accept lists.
            tools: declarations of tools; None for none.
            add_generation_prompt: whether the prompt ends with the beginning of the model's turn.
            **options: further variables of the template; ``reads`` tells whether a variable has an effect.

        Raises:
            InputError: ``messages`` is empty or malformed, or a value has no JSON type (code "invalid_messages"); the
                template refuses the messages and gives its reason ("template_refused"); the template fails or its
                output is too large ("template_failed").
        """
        template = self._template if tools is None else self._tool_template
        try:
            conversation = normalize_messages(messages, template.takes_json_text)
            variables = {
                "documents": None,
                **self._special_tokens,
                **{name: to_json_types(value, name) for name, value in options.items()},
                "tools": None if tools is None else to_json_types(tools, "tools"),
                "add_generation_prompt": bool(add_generation_prompt),
            }
        except RecursionError as error:
            raise _failure(error) from error
        try:
            return template.write({**variables, "messages": conversation})
        except Exception as error:
            joined = join_text_parts(conversation)
            if joined is None or find_non_text_content(conversation):
                raise _failure(error, conversation) from error
            try:
                return template.write({**variables, "messages": joined})
            except Exception as second_error:
                raise _failure(second_error, joined) from second_error


class _Compiled:
    """A compiled Jinja template."""

    def __init__(self, source: str) -> None:
        if len(source.encode(errors="replace")) > LARGEST_TEMPLATE:
            raise InputError(f"chat template: it is larger than {LARGEST_TEMPLATE} bytes", code="invalid_template")
        self._source = source
        self._environment = _Environment()
        self.takes_json_text = _TAKES_JSON_TEXT.search(source) is not None
        """Whether the template distinguishes arguments given as JSON text from arguments given as objects."""
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:
            raise _failure(error, code="invalid_template") from error

    def variables(self) -> frozenset[str]:
        """Return the names that the template reads without setting them first."""
        tree = self._environment.parse(self._source)
        first_use: dict[str, str] = {}
        for name in _names(tree):
            first_use.setdefault(name.name, name.ctx)
        undeclared = meta.find_undeclared_variables(tree) - self._environment.globals.keys()
        return frozenset(name for name in undeclared if first_use.get(name) == "load")

    def write(self, variables: Mapping[str, Any]) -> str:
        """Return the output for ``variables``.

        Raises:
            InputError: the output is too large.
            Exception: the template raised it.
        """
        pieces, length = [], 0
        for piece in self._template.generate(variables):
            length += len(piece)
            if length > _LARGEST_OUTPUT:
                raise InputError(
                    f"chat template: its output is longer than {_LARGEST_OUTPUT} characters", code="template_failed"
                )
            pieces.append(piece)
        return "".join(pieces)


class _RefusalError(TemplateError):
    """An error raised by the template through ``raise_exception``."""


class _Generation(Extension):
    """The tag ``{% generation %}``, which marks text of the model for training; its body is rendered unchanged."""

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
    """A replacement for ``dict``, whose unbound methods would escape the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace that refuses names with a leading underscore, which Python or Jinja may look up on the object."""

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
    """Return the number of items or bits of ``left operator right``; 0 if the result cannot be large."""
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
    raise _RefusalError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    """Yield the names below ``node`` in the order of evaluation."""
    if isinstance(node, nodes.Name):
        yield node
    children = list(node.iter_child_nodes())
    if isinstance(node, nodes.Assign | nodes.For):  # the target is first in the tree but evaluated last
        children[:2] = reversed(children[:2])
    for child in children:
        yield from _names(child)


def _failure(error: Exception, messages: Sequence[Mapping[str, Any]] = (), code: str = "template_failed") -> InputError:
    """Convert an error of the template to one line; put an unusual place in ``messages`` first, if there is one."""
    if isinstance(error, InputError):
        return error
    reason = " ".join(str(error).split())
    if isinstance(error, TemplateSyntaxError):
        reason = f"line {error.lineno}: {' '.join((error.message or '').split())}"
    elif not isinstance(error, TemplateError) or not reason:
        reason = f"{type(error).__name__}: {reason}"
    if len(reason) > _LONGEST_REASON:
        reason = reason[:_LONGEST_REASON] + "..."
    if isinstance(error, _RefusalError):
        code = "template_refused"
    unusual = find_non_text_content(messages) or find_unusual_role(messages, reason)
    return InputError(f"{unusual}; chat template: {reason}" if unusual else f"chat template: {reason}", code=code)
