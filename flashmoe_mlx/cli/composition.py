"""Configuration objects: what Hydra composed, with every key and type checked."""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from flashmoe_mlx.cli.task_keys import keys_of, task_names, unread_key
from flashmoe_mlx.cli.values import MISSING_VALUE
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.tasks.shared.keys import CommonConfig

_STAND_IN = "\N{OBJECT REPLACEMENT CHARACTER}???"
"""Replacement for the text ``???``, which OmegaConf would take for a missing value."""


def build_config(composed: DictConfig) -> CommonConfig:
    """Check a composed configuration and make an object of the task's class ``Config`` from it.

    Raises:
        InputError: there is no such task, a value has the wrong type, or the task does not read a key.
    """
    task = str(OmegaConf.select(composed, "task.name"))
    if task not in task_names():
        raise InputError(f"task={task}: no such task; the tasks are {', '.join(task_names())}", code="unknown_task")
    for key in map(str, composed):
        if key not in keys_of(task):
            raise unread_key(key, [task])
    config_type = import_module(f"flashmoe_mlx.tasks.{task}").Config
    filled = composed.copy()
    _replace_question_marks(filled)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_type), filled))
    except OmegaConfBaseException as error:
        raise InputError(_explain(error, composed, config_type), code="invalid_value") from error
    assert isinstance(config, CommonConfig)
    model = getattr(config, "model", None)
    if model is not None and model.shipped and model.synthetic is not None:
        raise InputError("model.synthetic: sizes can be set for model=synthetic only", code="contradiction")
    _restore_question_marks(config)
    _check_elements(config)
    return config


def _replace_question_marks(node: DictConfig | ListConfig) -> None:
    """Replace every text ``???`` in ``node``. No default has that value, so a person typed it."""
    keys: Iterable[Any] = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        if OmegaConf.is_missing(node, key):
            with read_write(node), open_dict(node):
                node[key] = _STAND_IN
        elif not OmegaConf.is_interpolation(node, key) and isinstance(value := node[key], DictConfig | ListConfig):
            _replace_question_marks(value)


def _restore_question_marks(value: Any) -> Any:
    """Restore the texts that ``_replace_question_marks`` replaced; return ``value``, or the text in its place."""
    if value == _STAND_IN:
        return MISSING_VALUE
    if isinstance(value, list):
        value[:] = [_restore_question_marks(element) for element in value]
    elif isinstance(value, dict):
        value.update({key: _restore_question_marks(element) for key, element in value.items()})
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            setattr(value, field.name, _restore_question_marks(getattr(value, field.name)))
    return value


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[int]: "a list such as [4,2]",
    list[float]: "a list such as [0.5,0.9]",
    list[str]: "a list such as [a,b]",
    dict[str, Any]: "a mapping such as {a:b}",
    list[Any]: "a list such as [a,{name:b}]",
}


def describe_type(hint: Any) -> str:
    """Describe the values that a type hint accepts; return an empty text for a group of keys."""
    hints = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = [_KINDS[kind] for kind in hints if kind in _KINDS]
    return " or ".join([*kinds, *(["null"] if kinds and NoneType in hints else [])])


def _explain(error: OmegaConfBaseException, composed: DictConfig, config_type: type[CommonConfig]) -> str:
    key = error.full_key or _mistyped_key(composed, config_type) or "configuration"
    top = key.partition("[")[0]  # the error may name an element of a list
    kind = describe_type(get_type_hints(config_type).get(top))
    if not kind:
        return f"{key}: {str(error.msg or error).splitlines()[0]}"
    return f"{top}={_shown(OmegaConf.select(composed, top))}: must be {kind}"


def _mistyped_key(composed: DictConfig, config_type: type[CommonConfig]) -> str | None:
    """Return the key whose value has the wrong type, for errors in which OmegaConf does not name it."""
    for key in map(str, composed):
        try:
            OmegaConf.merge(OmegaConf.structured(config_type), {key: composed[key]})
        except OmegaConfBaseException:
            return key
    return None


def _shown(value: Any) -> str:
    """Return a value as one would type it on the command line."""
    plain: Any = OmegaConf.to_container(value) if isinstance(value, ListConfig | DictConfig) else value
    if isinstance(plain, list):
        return f"[{','.join(map(_shown, plain))}]"
    if isinstance(plain, dict):
        return f"{{{','.join(f'{key}:{_shown(element)}' for key, element in plain.items())}}}"
    return "null" if plain is None else str(plain).lower() if isinstance(plain, bool) else str(plain)


def _check_elements(config: CommonConfig) -> None:
    """Refuse null, lists and mappings in lists of texts and numbers; OmegaConf accepts them."""
    for key, hint in get_type_hints(type(config)).items():
        options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        plain = any(get_origin(option) is list and get_args(option) != (Any,) for option in options)
        value = getattr(config, key)
        if plain and any(element is None or isinstance(element, list | dict) for element in value or ()):
            raise InputError(f"{key}={_shown(value)}: must be {describe_type(hint)}", code="invalid_value")
