"""Convert arguments, which models write as text, to the types in the JSON schemas of the declared tools.

The declarations come from clients and are not trusted: malformed parts are ignored, and nothing here raises an error.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote

from flashmoe_mlx.text.tool_formats.calls import json_text

_DEEPEST_SCHEMA = 32
_DEEPEST_VALUE = 100

Kinds = frozenset[str] | None
"""JSON types that a schema allows; None if it does not restrict the type."""

STRING: Kinds = frozenset({"string"})
_TYPES: dict[str, Kinds] = {
    "string": STRING,
    "integer": frozenset({"integer"}),
    "number": frozenset({"number", "integer"}),
    "boolean": frozenset({"boolean"}),
    "null": frozenset({"null"}),
    "array": frozenset({"array"}),
    "object": frozenset({"object"}),
}
_ALIASES = {
    "str": "string",
    "text": "string",
    "int": "integer",
    "long": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "none": "null",
    "list": "array",
    "tuple": "array",
    "dict": "object",
    "map": "object",
}
"""Names of types that are not part of JSON Schema but occur in hand-written tools."""
_IMPLIED = {
    "object": ("properties", "additionalProperties", "required", "patternProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("pattern", "minLength", "maxLength", "format", "contentEncoding"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
"""Keywords that imply the type if "type" is missing."""

_INSIDE = r"([^{0}\\]*(?:\\.[^{0}\\]*)*)\\?(?:{0}|\Z)"
"""A string after its opening quote. An unclosed string extends to the end, so that matching takes linear time."""
_PYTHON = re.compile(rf"""(?s)"{_INSIDE.format('"')}|'{_INSIDE.format("'")}|\b(True|False|None)\b|,(?=\s*[\]}}])""")
_ESCAPE = re.compile(r"""(?s)\\x([0-9A-Fa-f]{2})|\\(.)|["]""")
_BRACKET = re.compile(r"""(?s)"[^"\\]*(?:\\.[^"\\]*)*\\?(?:"|\Z)|[\[\]{}]""")
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


class Parameter(NamedTuple):
    """The values that a parameter's schema allows: JSON types, and the strings in an ``enum`` or ``const``."""

    kinds: Kinds
    words: frozenset[str] = frozenset()

    def fits(self, value: Any) -> bool:
        """Tell whether a value returned by ``convert`` has an allowed type; only a string may have the wrong type."""
        return not isinstance(value, str) or self.kinds is None or "string" in self.kinds


TEXT = Parameter(STRING)


class ToolSchemas:
    """The declared tools: their names, and the types of their parameters."""

    def __init__(self, tools: object = ()) -> None:
        self._schemas: dict[str, Any] = {}
        for tool in _items(tools):
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            name = function.get("name") if isinstance(function, Mapping) else None
            if isinstance(function, Mapping) and isinstance(name, str):
                self._schemas[name] = function.get("parameters", function.get("input_schema"))
        self._properties: dict[str, dict[str, Any]] = {}
        self._parameters: dict[tuple[str, str], Parameter] = {}

    def __contains__(self, function: str) -> bool:
        return function in self._schemas

    def declares(self, function: str, parameter: str) -> bool:
        """Tell whether ``function`` has ``parameter``; True if the parameters of the function are unknown."""
        properties = self._declared(function)
        return not properties or parameter in properties

    def parameter(self, function: str, name: str) -> Parameter:
        """Return the allowed values of a parameter: any string if the parameter is not declared."""
        key = (function, name)
        if key not in self._parameters:
            root = self._schemas.get(function)
            properties = self._declared(function)
            additional = root.get("additionalProperties") if isinstance(root, Mapping) else None
            reader = _Reader(root)
            kinds = reader.kinds(properties.get(name, additional))
            undeclared = kinds is None and name not in properties
            self._parameters[key] = TEXT if undeclared else Parameter(kinds, frozenset(reader.words))
        return self._parameters[key]

    @property
    def names(self) -> list[str]:
        """The names of the functions."""
        return list(self._schemas)

    def root(self, function: str) -> dict[str, Any]:
        """Return the schema of all parameters of ``function``; empty if it has none."""
        return self._resolved(function, self._schemas.get(function))

    def parameters(self, function: str) -> list[str]:
        """Return the names of the declared parameters of ``function``."""
        return list(self._declared(function))

    def required(self, function: str) -> frozenset[str]:
        """Return the names of the declared parameters without which a call is incomplete."""
        root = self._resolved(function, self._schemas.get(function))
        names = {name for name in _items(root.get("required")) if isinstance(name, str)}
        return frozenset(names & self._declared(function).keys())

    def is_open(self, function: str) -> bool:
        """Tell whether ``function`` takes parameters that are not declared, as an object without properties does."""
        root = self._schemas.get(function)
        return isinstance(root, Mapping) and "properties" not in root and root.get("additionalProperties") is not False

    def schema(self, function: str, name: str) -> dict[str, Any]:
        """Return the schema of a declared parameter, with the definitions to which its references may refer."""
        root = self._schemas.get(function)
        definitions = {key: root[key] for key in ("$defs", "definitions") if isinstance(root, Mapping) and key in root}
        return {**definitions, **self._resolved(function, self._declared(function).get(name))}

    def _resolved(self, function: str, schema: Any) -> dict[str, Any]:
        """Return ``schema``, or the schema that its ``$ref`` names, as an object."""
        if not isinstance(schema, Mapping):
            return {}
        target = _Reader(self._schemas.get(function)).target(schema.get("$ref"))
        if not isinstance(target, Mapping):
            return dict(schema)
        return {**target, **{key: value for key, value in schema.items() if key != "$ref"}}

    def _declared(self, function: str) -> dict[str, Any]:
        """Return the schemas of the declared parameters by name."""
        if function not in self._properties:
            root = self._schemas.get(function)
            self._properties[function] = _Reader(root).properties(root)
        return self._properties[function]


class _Reader:
    """A reader of schemas whose references are relative to ``root``; it reads each schema once.

    Attributes:
        words: strings in the ``enum`` and ``const`` keywords of the schemas read by ``kinds``.
    """

    def __init__(self, root: Any) -> None:
        self.words: set[str] = set()
        self._root = root
        self._known: dict[int, Kinds] = {}
        self._seen: set[int] = set()

    def properties(self, schema: Any, depth: int = 0) -> dict[str, Any]:
        """Return the schemas of the properties by name, including those in references and combined schemas."""
        if not isinstance(schema, Mapping) or depth > _DEEPEST_SCHEMA or id(schema) in self._seen:
            return {}
        self._seen.add(id(schema))
        found: dict[str, Any] = {}
        parts = [self.target(schema.get("$ref"))]
        parts += [part for key in ("allOf", "anyOf", "oneOf") for part in _items(schema.get(key))]
        for part in parts:
            found |= self.properties(part, depth + 1)
        own = schema.get("properties")
        if isinstance(own, Mapping):
            found |= {name: value for name, value in own.items() if isinstance(name, str)}
        return found

    def kinds(self, schema: Any, depth: int = 0) -> Kinds:
        """Return the types that ``schema`` allows."""
        if not isinstance(schema, Mapping) or depth > _DEEPEST_SCHEMA:
            return None
        if id(schema) not in self._known:
            self._known[id(schema)] = None  # a cycle adds nothing
            found: Kinds = None
            for part in self._parts(schema, depth + 1):
                common = part if found is None or part is None else found & part
                found = common or found
            if found is None:
                implied = (name for name, keywords in _IMPLIED.items() if any(word in schema for word in keywords))
                found = _TYPES.get(next(implied, ""))
            if found is not None and schema.get("nullable") is True:
                found |= {"null"}
            self._known[id(schema)] = found
        return self._known[id(schema)]

    def _parts(self, schema: Mapping[str, Any], depth: int) -> Iterator[Kinds]:
        """Yield the types that each keyword of a schema allows."""
        types = schema.get("type")
        yield _union(_TYPES.get(_type_name(name)) for name in (types if isinstance(types, list | tuple) else [types]))
        values = [*_items(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
        self.words.update(value for value in values if isinstance(value, str))
        yield _union(map(_kinds_of, values))
        yield self.kinds(self.target(schema.get("$ref")), depth)
        for part in _items(schema.get("allOf")):
            yield self.kinds(part, depth)
        for key in ("anyOf", "oneOf"):
            yield _union(self.kinds(part, depth) for part in _items(schema.get(key)))

    def target(self, reference: Any) -> Any:
        """Return the schema at a local reference such as ``#/$defs/Unit``; None if there is none."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        found = self._root
        for step in filter(None, reference[1:].split("/")):
            key = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping):
                found = found.get(key)
            elif isinstance(found, Sequence) and not isinstance(found, str) and key.isdecimal() and len(key) < 9:
                found = found[int(key)] if int(key) < len(found) else None
            else:
                return None
        return found


def convert(text: str, parameter: Parameter) -> tuple[Any, str] | None:
    """Convert the text of a value; return the value and its JSON text.

    A string is not changed. For other types, the text may be JSON or a Python literal. Text that is neither, or that
    has the wrong type, stays a string, because a wrong value is more informative for the caller than no value. The
    result is None for empty text if the parameter is not a string.
    """
    kinds = parameter.kinds
    if kinds == STRING or (text in parameter.words and parameter.fits(text)):
        return text, json_text(text)
    stripped = text.strip()
    if not stripped and kinds is not None and "string" not in kinds:
        return None
    try:
        value = _literal(stripped, kinds)
        if _fits(value, kinds):
            if kinds is not None and isinstance(value, float) and "number" not in kinds and value.is_integer():
                value = int(value)
            return value, json_text(value)
    except (ValueError, RecursionError):
        pass
    return text, json_text(text)


def _fits(value: Any, kinds: Kinds) -> bool:
    """Tell whether a parsed value may replace its text."""
    found = _kinds_of(value)
    if kinds is None or found is None:
        return isinstance(value, dict | list)
    if "string" not in kinds and (value is None or (isinstance(value, float) and "integer" in kinds)):
        return True
    return bool(found & kinds) and not isinstance(value, str)


def _literal(text: str, kinds: Kinds) -> Any:
    """Parse ``text`` as JSON or as a Python literal.

    Raises:
        ValueError: the text is neither, or it is nested too deeply.
    """
    word = text.lower()
    if kinds is not None and "boolean" in kinds and word in ("true", "false"):
        return word == "true"
    if text in _PYTHON_WORDS:
        text = _PYTHON_WORDS[text]
    _check_depth(text)
    try:
        return _json(text)
    except ValueError:
        if not text.startswith(("[", "{")):
            raise
        return _json(_PYTHON.sub(_as_json, text))


def _json(text: str) -> Any:
    return json.loads(
        text, strict=False, parse_constant=_refuse, parse_float=_finite
    )  # not strict: models write line breaks in strings


def _as_json(match: re.Match[str]) -> str:
    """Return the JSON for a Python token: a quoted string, a constant, or a comma before a closing bracket."""
    double, single, word = match.groups()
    if word:
        return _PYTHON_WORDS[word]
    inside = single if double is None else double
    return "" if inside is None else f'"{_ESCAPE.sub(_json_escape, inside)}"'


def _json_escape(match: re.Match[str]) -> str:
    code, character = match.groups()
    if code:
        return f"\\u00{code}"
    return "'" if character == "'" else f"\\{character or match[0]}"


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(text)
    return value


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= _DEEPEST_VALUE:
        return
    depth = 0
    for bracket in _BRACKET.findall(text):
        depth += 1 if bracket in "[{" else -1 if bracket in "]}" else 0
        if depth > _DEEPEST_VALUE:
            raise ValueError("nested too deeply")


def _kinds_of(value: Any) -> Kinds:
    """Return the type of a JSON value; None for values of other types."""
    if value is None:
        return _TYPES["null"]
    if isinstance(value, float):
        return frozenset({"number"})
    for types, name in (
        (bool, "boolean"),
        (int, "integer"),
        (str, "string"),
        (Mapping, "object"),
        (list | tuple, "array"),
    ):
        if isinstance(value, types):
            return _TYPES[name]
    return None


def _union(found: Iterator[Kinds]) -> Kinds:
    return frozenset().union(*(kinds for kinds in found if kinds)) or None


def _type_name(name: Any) -> str:
    word = name.lower() if isinstance(name, str) else ""
    return _ALIASES.get(word, word)


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
