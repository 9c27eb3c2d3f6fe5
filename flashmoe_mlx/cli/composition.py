"""From what Hydra composed to the configuration object of a task, with every key and type checked."""

import difflib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.tasks.keys import TASK_CONFIGS, CommonConfig, keys_of

GROUPS = ("task", "model", "backend", "experiment")
"""Keys whose value names a file in ``configs/<key>/``."""

_QUESTION_MARKS = "???"
_STAND_IN = "\N{OBJECT REPLACEMENT CHARACTER}???"
"""Stands for the text ``???`` while OmegaConf has it, which would take it for a missing value."""


def unread_key(key: str, tasks: Iterable[str]) -> InputError:
    """Explain that one of ``tasks`` does not read the top-level key ``key``."""
    own = next(task for task in tasks if key not in keys_of(task))
    readers = [task for task in TASK_CONFIGS if key in keys_of(task)]
    choices = sorted(set(keys_of(own)) - {"task"})
    if readers:  # the key of another task was probably meant, unless this one has it under a similar name
        choices = [name for name in choices if name in key or key in name]
    close = difflib.get_close_matches(key, choices, n=1)
    hints = [f"did you mean {close[0]}?"] if close else []
    if readers:
        hints.append(f"it belongs to task={', '.join(readers)}")
    if not hints:
        hints.append(f"it has {', '.join(choices)}")
    return InputError(f"{key}: task={own} has no such key; {'; '.join(hints)}", code="unknown_key")


def typed(composed: DictConfig) -> CommonConfig:
    """Check a composed configuration and make it an object.

    Raises:
        InputError: a value has the wrong type, or a key is not read by this task.
    """
    task = str(OmegaConf.select(composed, "task.name"))
    config_type = TASK_CONFIGS.get(task)
    if config_type is None:
        raise InputError(f"task={task}: no such task; there are {', '.join(TASK_CONFIGS)}", code="unknown_task")
    for key in map(str, composed):
        if key not in keys_of(task):
            raise unread_key(key, [task])
    filled = composed.copy()
    _replace_question_marks(filled)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_type), filled))
    except OmegaConfBaseException as error:
        raise InputError(_explained(error, composed, config_type), code="invalid_value") from error
    assert isinstance(config, CommonConfig)
    model = getattr(config, "model", None)
    if model is not None and model.shipped and model.synthetic is not None:
        raise InputError("model.synthetic: these sizes belong to model=synthetic", code="contradiction")
    _restore_question_marks(config)
    _check_elements(config)
    return config


def _replace_question_marks(node: DictConfig | ListConfig) -> None:
    """Replace texts ``???``, of any depth. Defaults have no missing values, so a person wrote them."""
    keys: Iterable[Any] = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        if OmegaConf.is_missing(node, key):
            with read_write(node), open_dict(node):
                node[key] = _STAND_IN
        elif not OmegaConf.is_interpolation(node, key) and isinstance(value := node[key], DictConfig | ListConfig):
            _replace_question_marks(value)


def _restore_question_marks(value: Any) -> Any:
    """Put the texts back into an object; returns the replacement of ``value`` itself."""
    if value == _STAND_IN:
        return _QUESTION_MARKS
    if isinstance(value, list):
        value[:] = [_restore_question_marks(one) for one in value]
    elif isinstance(value, dict):
        value.update({key: _restore_question_marks(one) for key, one in value.items()})
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            setattr(value, item.name, _restore_question_marks(getattr(value, item.name)))
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


def kind_of(hint: Any) -> str:
    """Describe the values that a type hint accepts; empty for a group of keys."""
    hints = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = [_KINDS[kind] for kind in hints if kind in _KINDS]
    return " or ".join([*kinds, *(["null"] if kinds and NoneType in hints else [])])


def _explained(error: OmegaConfBaseException, composed: DictConfig, config_type: type[CommonConfig]) -> str:
    key = error.full_key or _misfit(composed, config_type) or "configuration"
    top = key.partition("[")[0]  # an element of a list does not fit
    kind = kind_of(get_type_hints(config_type).get(top))
    if not kind:
        return f"{key}: {str(error.msg or error).splitlines()[0]}"
    return f"{top}={_shown(OmegaConf.select(composed, top))}: must be {kind}"


def _misfit(composed: DictConfig, config_type: type[CommonConfig]) -> str | None:
    """Return the key whose value is of the wrong kind, where OmegaConf does not say it."""
    for key in map(str, composed):
        try:
            OmegaConf.merge(OmegaConf.structured(config_type), {key: composed[key]})
        except OmegaConfBaseException:
            return key
    return None


def _shown(value: Any) -> str:
    """Return a value as on the command line."""
    plain: Any = OmegaConf.to_container(value) if isinstance(value, ListConfig | DictConfig) else value
    if isinstance(plain, list):
        return f"[{','.join(map(_shown, plain))}]"
    if isinstance(plain, dict):
        return f"{{{','.join(f'{key}:{_shown(one)}' for key, one in plain.items())}}}"
    return "null" if plain is None else str(plain).lower() if isinstance(plain, bool) else str(plain)


def _check_elements(config: CommonConfig) -> None:
    """Refuse lists and mappings in lists of texts and numbers, which OmegaConf lets pass."""
    for key, hint in get_type_hints(type(config)).items():
        options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        plain = any(get_origin(one) is list and get_args(one) != (Any,) for one in options)
        value = getattr(config, key)
        if plain and any(one is None or isinstance(one, list | dict) for one in value or ()):
            raise InputError(f"{key}={_shown(value)}: must be {kind_of(hint)}", code="invalid_value")
