"""Program that runs the functions of a Python file for ``python_file.PythonTools``.

It uses only the standard library, and is started as a script with the file as its argument. It writes the declarations
of the functions as one line of JSON, then for each line on stdin (``{"name": ..., "arguments": {...}}``) a line with
``{"result": ...}`` or ``{"error": ...}``. What the functions print is part of their result.
"""

import contextlib
import importlib.util
import inspect
import io
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_TYPES: Mapping[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?):\s*$")
_ARGUMENT = re.compile(r"^\s+(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


def schema_of(hint: Any) -> dict[str, Any]:
    """Return the JSON schema of a type hint; an unknown type allows any value."""
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is typing.Annotated:
        text = next((text for text in arguments[1:] if isinstance(text, str)), None)
        return schema_of(arguments[0]) | ({} if text is None else {"description": text})
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [schema_of(option) for option in arguments]}
    if hint is list or origin in (list, tuple, set):
        inner = schema_of(arguments[0]) if arguments else {}
        return {"type": "array", **({"items": inner} if inner else {})}
    if hint is dict or origin is dict:
        return {"type": "object"}
    return {}


def declaration(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Return the declaration of ``function``, from its signature and its docstring."""
    about, arguments = parse_docstring(inspect.getdoc(function) or "")
    hints = typing.get_type_hints(function, include_extras=True)
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(f"{name}: the parameter {parameter.name!r} cannot be given by name")
        schema = schema_of(hints.get(parameter.name, parameter.empty))
        if parameter.name in arguments:
            schema.setdefault("description", arguments[parameter.name])
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        properties[parameter.name] = schema
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the description in a docstring, without its sections, and the descriptions of the arguments."""
    about: list[str] = []
    arguments: dict[str, str] = {}
    section = latest = ""
    for line in text.splitlines():
        heading = _SECTION.match(line)
        if heading:
            section = heading[1]
        elif not section:
            about.append(line)
        elif section in ("Args", "Arguments", "Parameters") and (found := _ARGUMENT.match(line)):
            latest = found[1]
            arguments[latest] = found[2]
        elif section in ("Args", "Arguments", "Parameters") and latest and line.strip():
            arguments[latest] = f"{arguments[latest]} {line.strip()}"
    return "\n".join(about).strip(), arguments


def functions_of(path: Path) -> dict[str, Callable[..., Any]]:
    """Run the file; return its public functions, or those in ``__all__``, in the order of the file."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    listed = getattr(module, "__all__", None)
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and (name in listed if listed is not None else value.__module__ == path.stem and not name.startswith("_"))
    }


def call(functions: Mapping[str, Callable[..., Any]], name: str, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return the answer to one request."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            value = functions[name](**arguments)
        result = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except Exception as error:
        return {"error": f"{printed.getvalue()}{type(error).__name__}: {error}"}
    return {"result": printed.getvalue() + ("" if value is None and printed.getvalue() else result)}


def main() -> None:
    """Serve calls until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the file prints must not mix with answers

    def answer(content: object) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        functions = functions_of(Path(sys.argv[1]))
        answer({"tools": [declaration(name, function) for name, function in functions.items()]})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin:
        request = json.loads(line)
        answer(call(functions, request["name"], request["arguments"]))


if __name__ == "__main__":
    main()
