"""A grammar of tool calls in Qwen's format, in the dialect of Lark that llguidance reads.

The grammar enforces the names of functions and parameters, that required parameters are given, and the type of each
value. Values that may be strings are raw text, as the published templates write them; an ``enum`` of strings allows
only these strings. All other values are JSON that satisfies the schema of the parameter. ``True`` and ``False`` are
also allowed, because templates print them so.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from flashmoe_mlx.text.tool_formats.schemas import STRING, ToolSchemas

_MOST_IN_ANY_ORDER = 5
"""The largest number of parameters, or of required ones, for which every order is allowed: rules double with each."""
_RULES = r"""
raw[lazy]: /(.|\n)*\n<\/parameter>\n/
other: "<parameter=" /[^<>\n]+/ ">\n" raw
boolean: "true" | "false" | "True" | "False"
"""
Fits = Callable[[Mapping[str, Any]], bool]
"""Tells whether a JSON schema can be enforced."""


def body_grammar(tools: Sequence[Mapping[str, Any]], fits: Fits, end: str) -> str:
    """Return rules whose symbol ``body`` is a call of one of ``tools``, from the text after ``<tool_call>``.

    Args:
        tools: declarations of functions, at least one.
        fits: tells whether a schema can be enforced; a value with another schema may be any value of its types.
        end: the symbol of ``</tool_call>``.

    Raises:
        ValueError: the name of a function or a parameter cannot be written in this format.
    """
    schemas = ToolSchemas(tools)
    rules = [_RULES]
    for index, name in enumerate(schemas.names):
        rules += _Function(f"f{index}", name, schemas, fits).rules()
    functions = " | ".join(f"f{index}" for index in range(len(schemas.names)))
    rules.append(f'body: "\\n" ({functions}) {end}')
    return "\n".join(rules)


class _Function:
    """The rules of one function; ``symbol`` is the prefix of their names."""

    def __init__(self, symbol: str, name: str, schemas: ToolSchemas, fits: Fits) -> None:
        self._symbol = symbol
        self._name = name
        self._schemas = schemas
        self._fits = fits
        self._parameters = list(schemas.parameters(name))
        required = schemas.required(name)
        self._required = [parameter for parameter in self._parameters if parameter in required]
        for text in (name, *self._parameters):
            if any(mark in text for mark in "<>\n") or text != text.strip():
                raise ValueError(f"the name {text!r:.60} cannot be written in a call of this model's format")

    def rules(self) -> list[str]:
        """Return the rules of the function and its parameters."""
        rules = [self._parameter_rule(index, name) for index, name in enumerate(self._parameters)]
        if not self._parameters:
            arguments = "other*" if self._schemas.is_open(self._name) else ""
        elif len(self._parameters) <= _MOST_IN_ANY_ORDER:
            arguments, orders = self._any_order(self._parameters, "")
            rules += orders
        elif len(self._required) <= _MOST_IN_ANY_ORDER:
            arguments, orders = self._any_order(self._required, self._optional())
            rules += orders
        else:  # in the order of the declaration
            between = self._optional()
            arguments = between + between.join(self._symbols(self._required)) + between
        start, end = _text(f"<function={self._name}>\n"), _text("</function>\n")
        return [*rules, f"{self._symbol}: {start} {arguments} {end}"]

    def _optional(self) -> str:
        """Return an expression for optional parameters, of which one may come twice, but no more than there are."""
        symbols = self._symbols(name for name in self._parameters if name not in self._required)
        return f" ({' | '.join(symbols)}){{0,{len(symbols)}}} " if symbols else " "

    def _any_order(self, names: Sequence[str], between: str) -> tuple[str, list[str]]:
        """Return the start and the rules for ``names`` in any order, each once, with ``between`` around each.

        One rule stands for each set of parameters that are still to come.
        """

        def symbol(missing: Iterable[str]) -> str:
            return f"{self._symbol}_" + "_".join(str(names.index(name)) for name in missing)

        rules = []
        for count in range(len(names) + 1):
            for missing in combinations(names, count):
                options = [
                    f"{self._symbols([name])[0]} {between} {symbol(rest for rest in missing if rest != name)}"
                    for name in missing
                ]
                if not set(missing) & set(self._required):
                    options.append('""')
                rules.append(f"{symbol(missing)}: {' | '.join(options)}")
        return f"{between} {symbol(names)}", rules

    def _symbols(self, names: Iterable[str]) -> list[str]:
        return [f"{self._symbol}p{self._parameters.index(name)}" for name in names]

    def _parameter_rule(self, index: int, name: str) -> str:
        return f"{self._symbol}p{index}: {_text(f'<parameter={name}>' + chr(10))} {self._value(name)}"

    def _value(self, name: str) -> str:
        """Return the expression for the value of a parameter and its end."""
        parameter = self._schemas.parameter(self._name, name)
        end = _text("\n</parameter>\n")
        schema = self._schemas.schema(self._name, name)
        words = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if parameter.kinds == STRING and isinstance(words, list) and words:
            return f"({' | '.join(_text(word) for word in words if isinstance(word, str))}) {end}"
        if parameter.kinds is None or "string" in parameter.kinds:
            return "raw"
        if parameter.kinds == {"boolean"}:
            return f"boolean {end}"
        if not self._fits(schema):
            schema = {"type": sorted(parameter.kinds)}
        return f"%json {json.dumps(schema)} {end}"


def _text(text: str) -> str:
    """Return a literal of the grammar."""
    return json.dumps(text, ensure_ascii=False)
