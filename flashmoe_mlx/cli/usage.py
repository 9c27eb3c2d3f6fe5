"""Text of ``--help``: the keys of one task, with the defaults, descriptions and examples from ``configs/``."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib.resources import files as package_files
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from flashmoe_mlx.cli.arguments import CommandLine
from flashmoe_mlx.cli.task_keys import config_class, keys_of, names_in_group, task_names, unread_key
from flashmoe_mlx.errors import InputError

_KEY = re.compile(r"^(?P<indent> *)(?P<key>\w+): *(?P<default>\[.*?\]|.*?)(?: +# (?P<about>.*))?$", re.MULTILINE)
_INCLUDED = re.compile(r"^  - /(\w+)$", re.MULTILINE)
"""Matches a file of shared keys in the defaults of a task."""
_EXAMPLE = "Example: "
_TYPES = {
    int: "int",
    float: "number",
    bool: "true|false",
    str: "text",
    list: "list",
    dict: "{NAME:VALUE}",
    Any: "list|{NAME:VALUE}",
    NoneType: "null",
}
_GENERAL = """\
All tasks
  debug=true                show full tracebacks
  --cfg job                 show the configuration without running the task
  -m                        run once for each of several values: experts_k=2,4; quote texts: prompt="'A','B'"
  hydra.run.dir=DIR         directory for the record of the run; with -m: hydra.sweep.dir=DIR
  --version, --hydra-help"""
_KEY_WIDTH = 26
_TYPE_WIDTH = 17


def help_text(line: CommandLine) -> str:
    """Return the help for the task that ``line`` selects.

    Raises:
        InputError: there is no such task, or the task has no backend and ``line`` selects one.
    """
    tasks = line.tasks()
    if tasks is None or len(tasks) != 1:
        raise InputError(f"task={line.value('task')}: --help explains one task: {', '.join(task_names())}")
    (task,) = tasks
    return "\n".join(_lines(task, line.value("backend")))


def _lines(task: str, backend: str | None) -> Iterator[str]:
    yield "flashmoe_mlx: run Mixture-of-Experts models larger than memory\n"
    yield "  python -m flashmoe_mlx [task=NAME] [key=value ...]       key=value and +key=value mean the same\n"
    yield f"task={task}: {_summary('task', task)}"
    described = _described("task", f"{task}.yaml")
    for name in _INCLUDED.findall(_text("task", f"{task}.yaml")):
        described |= _described("", f"{name}.yaml")
    keys = keys_of(task)
    for key, hint in _typed_keys(config_class(task)):
        if key in described:
            default, about = described[key]
            yield _row(f"{key}={default}", _type_name(hint), about)
    yield ""
    if "model" in keys:
        yield from _group("model", "demo")
        yield _row("model.path=DIR", "", "a pack or checkpoint, such as model.path=~/packs/qwen35-397b")
        yield _row(
            "model.cache_dir=DIR",
            "",
            "folder for generated models; null: $FLASHMOE_CACHE, or flashmoe_mlx in the user's cache folder",
        )
        yield ""
    if "backend" in keys:
        yield from _group("backend", "pread")
        name = backend or "pread"
        options = _described("backend", f"{name}.yaml")
        yield f"\nbackend={name}: {_summary('backend', name)}"
        for option, (default, about) in options.items():
            if option != "_target_":
                yield _row(f"backend.{option}={default}", "", about)
        yield ""
    elif backend is not None:
        raise unread_key("backend", [task])
    yield "Examples"
    for comment in _comments("task", task):
        if comment.startswith(_EXAMPLE):
            yield f"  python -m flashmoe_mlx {comment.removeprefix(_EXAMPLE)}"
    yield "\nTasks: task=NAME --help shows the keys of a task"
    for name in task_names():
        yield _row(f"task={name}", "", _summary("task", name))
    yield "\nStudies: experiment=NAME sets keys, each of which can be overridden"
    for name in names_in_group("experiment"):
        yield _row(f"experiment={name}", "", _summary("experiment", name))
    yield f"\n{_GENERAL}"


def _typed_keys(config: type) -> Iterator[tuple[str, object]]:
    """Yield the keys of a task with their types; the keys of a group follow one another."""
    hints = get_type_hints(config)
    for field in fields(config):
        hint = hints[field.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from ((f"{field.name}.{key}", inner) for key, inner in _typed_keys(hint))
        else:
            yield field.name, hint


def _row(key: str, type_name: str, about: str) -> str:
    """Return a line with a key, its type and its description; a long key gets a separate line."""
    start = f"  {key}\n{'':{_KEY_WIDTH + 2}}" if len(key) >= _KEY_WIDTH else f"  {key:<{_KEY_WIDTH}}"
    return f"{start}{type_name:<{_TYPE_WIDTH}}{about}".rstrip() if type_name else f"{start}{about}".rstrip()


def _type_name(hint: object) -> str:
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return "|".join(_TYPES[get_origin(option) or option] for option in options)


def _group(group: str, default: str) -> Iterator[str]:
    for name in names_in_group(group):
        yield _row(f"{group}={name}", "", f"{_summary(group, name)}{' (default)' if name == default else ''}")


def _summary(group: str, name: str) -> str:
    """Return the first comment of a file in ``configs/``, which describes it."""
    return next(_comments(group, name))


def _comments(group: str, name: str) -> Iterator[str]:
    """Yield the comments on separate lines, without directives to Hydra."""
    for line in _text(group, f"{name}.yaml").splitlines():
        if line.startswith("# ") and not line.startswith("# @"):
            yield line.removeprefix("# ")


def _described(group: str, file: str) -> dict[str, tuple[str, str]]:
    """Return the default and the comment of each key of a file in ``configs/``."""
    found: dict[str, tuple[str, str]] = {}
    parent = ""
    for match in _KEY.finditer(_text(group, file)):
        parent = parent if match["indent"] else match["key"]
        key = f"{parent}.{match['key']}" if match["indent"] else parent
        if parent not in ("defaults", "task"):
            found[key] = match["default"], match["about"] or ""
    return found


def _text(group: str, file: str) -> str:
    name = file.removesuffix(".yaml")
    if group and name not in names_in_group(group):
        names = ", ".join(names_in_group(group))
        raise InputError(f"{group}={name}: no such {group}; choose from {names}", code="unknown_name")
    path = package_files("flashmoe_mlx.configs").joinpath(*filter(None, (group, file)))
    return path.read_text(encoding="utf-8")
