"""Keys of each task: names, types, and the nearest key to a misspelled one.

A task declares its keys in the class ``Config`` of its module. This module compiles that class without the rest of the
task, because importing a task takes MLX and half a second, and ``--help`` and hints about misspelled keys need neither.
"""

import ast
import dataclasses
import difflib
import re
import typing
from collections.abc import Collection, Iterable
from functools import cache
from importlib.resources import files as package_files
from types import NoneType
from typing import Any

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.tasks.shared import keys as shared_keys
from flashmoe_mlx.tasks.shared.keys import CommonConfig

DEFAULT_TASK = "generate"
GROUPS = ("task", "model", "backend", "experiment")
"""Keys whose value names a file in ``configs/<key>/``."""


@cache
def task_names() -> tuple[str, ...]:
    """Return the names of all tasks: the files in ``configs/task/``."""
    return tuple(names_in_group("task"))


def names_in_group(group: str) -> list[str]:
    """Return the names of the files in ``configs/<group>/``, sorted."""
    folder = package_files("flashmoe_mlx.configs").joinpath(group)
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


@cache
def config_class(task: str) -> type[CommonConfig]:
    """Return the class ``Config`` of a task, compiled without importing the task.

    The class may use ``dataclasses``, ``typing``, and the names of ``tasks/shared/keys.py``.
    """
    path = package_files("flashmoe_mlx.tasks").joinpath(f"{task}.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definition = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    namespace: dict[str, Any] = {**vars(dataclasses), **vars(typing), **vars(shared_keys)}
    code = compile(ast.Module([definition], type_ignores=[]), str(path), "exec")
    exec(code, namespace)  # noqa: S102  # a class of this package
    config: type[CommonConfig] = namespace["Config"]
    return config


def keys_of(task: str) -> list[str]:
    """Return the top-level keys of ``task`` in the order of its dataclass."""
    return [field.name for field in dataclasses.fields(config_class(task))]


@cache
def known_keys() -> tuple[str, ...]:
    """Return the top-level keys of all tasks, sorted."""
    return tuple(sorted({key for task in task_names() for key in keys_of(task)}))


def full_key(key: str, tasks: Collection[str] | None) -> str:
    """Return the key that ``key`` is short for in all of ``tasks``, such as ``tools.file`` for ``tools``."""
    found = [field for task in tasks or () for field in dataclasses.fields(config_class(task)) if field.name == key]
    short = {field.metadata.get("short_for") for field in found}
    return f"{key}.{short.pop()}" if len(short) == 1 and None not in short else key


def key_of_word(word: str, tasks: Collection[str] | None) -> str | None:
    """Return the key of which ``word`` alone is a value in one of ``tasks``; None if there is no such key."""
    for task in tasks or ():
        for field in dataclasses.fields(config_class(task)):
            if word in field.metadata.get("words", ()):
                return field.name
    return None


@dataclasses.dataclass(frozen=True)
class TextKey:
    """Key whose characters have no special meaning; ``nullable`` if ``null`` is not text, ``listed`` for a list."""

    nullable: bool
    listed: bool


def text_key(key: str, tasks: Collection[str] | None) -> TextKey | None:
    """Describe ``key`` if its value is text for one of ``tasks`` (None: for any task); return None if it is not."""
    for task in task_names() if tasks is None else tasks:
        found = _text_key(config_class(task), key)
        if found is not None:
            return found
    return None


def _text_key(config: type, key: str) -> TextKey | None:
    name, _, rest = key.partition(".")
    field = next((field for field in dataclasses.fields(config) if field.name == name), None)
    if field is None:
        return None
    hint = typing.get_type_hints(config)[name]
    if rest:
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return _text_key(hint, rest)
        return TextKey(nullable=True, listed=False) if rest in field.metadata.get("text_options", ()) else None
    if not field.metadata.get("text"):
        return None
    options = typing.get_args(hint) or (hint,)
    return TextKey(NoneType in options, any(typing.get_origin(option) is list for option in options))


def check_key(key: str, tasks: Collection[str] | None) -> None:
    """Check that ``key`` exists, and that each of ``tasks`` reads it; None stands for unknown tasks.

    Raises:
        InputError: the key does not exist, or a task does not read it; the message names the nearest key.
    """
    root = root_of(key)
    unread = [task for task in tasks or () if root not in ("experiment", *keys_of(task))]
    if (unread or not tasks) and root not in GROUPS and root not in known_keys():
        raise _unknown_key(key, tasks)
    if unread:
        raise unread_key(root, unread)
    if root == "task" and key != "task":
        raise InputError(f"{key}: to choose a task, give its name: task={', '.join(task_names())}", code="unknown_key")
    if key.startswith("model."):
        _check_model_key(key)


def _unknown_key(key: str, tasks: Collection[str] | None) -> InputError:
    root = root_of(key)
    known = sorted({*known_keys(), *GROUPS})
    own = sorted({*keys_of(next(iter(tasks))), *GROUPS}) if tasks else known
    nearest = difflib.get_close_matches(root, own, n=1) or difflib.get_close_matches(root, known, n=1)
    hint = f"did you mean {nearest[0]}{key[len(root) :]}?" if nearest else f"the keys are {', '.join(own)}"
    return InputError(f"{key}: no such key; {hint}", code="unknown_key")


def _check_model_key(key: str) -> None:
    name = key.split(".")[1]
    choices = sorted({field.name for field in dataclasses.fields(shared_keys.ModelChoice)} - {"name", "shipped"})
    if name in choices or name in ("name", "shipped"):
        return
    nearest = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean model.{nearest[0]}?" if nearest else f"model has {', '.join(choices)}"
    raise InputError(f"{key}: no such key; {hint}", code="unknown_key")


def unread_key(key: str, tasks: Iterable[str]) -> InputError:
    """Make the error for a top-level key that one of ``tasks`` does not read; it names the nearest key and readers."""
    task = next(task for task in tasks if key not in keys_of(task))
    readers = [name for name in task_names() if key in keys_of(name)]
    choices = sorted(set(keys_of(task)) - {"task"})
    if readers:  # most probably meant for another task, unless this task has a similar key
        choices = [name for name in choices if name in key or key in name]
    nearest = difflib.get_close_matches(key, choices, n=1)
    hints = [f"did you mean {nearest[0]}?"] if nearest else []
    if readers:
        hints.append(f"{key} belongs to task={', '.join(readers)}")
    if not hints:
        hints.append(f"its keys are {', '.join(choices)}")
    return InputError(f"{key}: task={task} has no such key; {'; '.join(hints)}", code="unknown_key")


def root_of(key: str) -> str:
    """Return the top-level key of ``key``."""
    return re.split(r"[./@:]", key, maxsplit=1)[0]
