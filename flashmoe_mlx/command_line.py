"""Tidy the command line before Hydra sees it.

Hydra has one spelling for each situation: ``+key=value`` only for keys that are not in the configuration yet,
``key=value`` only for those that are, options never between overrides, and a grammar in which a comma or an apostrophe
in a prompt means something else. People should not have to know any of that.
"""

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from flashmoe_mlx.composition import GROUPS, unread_key
from flashmoe_mlx.config import DEFAULT_TASK, TASK_CONFIGS, TEXT_KEYS, keys_of, known_keys
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.quoting import quoted_reference, separate_texts, verbatim

_OVERRIDE = re.compile(r"(?P<sign>\+*)(?P<key>[A-Za-z_][\w./@:-]*)=(?P<value>.*)", re.DOTALL)
_FLAGS = {
    "-h": "--help",
    "-i": "--info",
    "-sc": "--shell-completion",
    "-c": "--cfg",
    "-p": "--package",
    "-r": "--run",
    "-m": "--multirun",
    "-cp": "--config-path",
    "-cn": "--config-name",
    "-cd": "--config-dir",
}
_OPTIONS = frozenset((*_FLAGS, *_FLAGS.values(), "--hydra-help", "--version", "--resolve", "--experimental-rerun"))
"""What Hydra's own parser knows; it answers others with its usage."""
_MODES = ("--run", "--multirun", "--cfg", "--info", "--shell-completion")
_COMPLETION = ("install", "uninstall", "query")
_HYDRA_PATHS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
_MISSING = "???"
"""OmegaConf's word for a missing value."""
_OVERRIDE_TASK = re.compile(r"^\s*- override /?task: *(\w+)", re.MULTILINE)


class Override(NamedTuple):
    """One ``key=value``; ``sign`` is Hydra's "+" or "++" before it, if there was one."""

    sign: str
    key: str
    value: str


@dataclass(frozen=True)
class CommandLine:
    """Arguments by kind: overrides, and Hydra's ``options`` with their values, in the order given."""

    overrides: list[Override]
    options: list[str]

    @property
    def flags(self) -> list[str]:
        """The options in their long spelling, without values."""
        found = (argument.partition("=")[0] for argument in self.options)
        return [_FLAGS.get(flag, flag) for flag in found if flag in _OPTIONS]

    @property
    def sweeps(self) -> bool:
        """Whether commas separate the values of several runs."""
        return "--multirun" in self.flags or self.value("hydra.mode") == "MULTIRUN"

    def value(self, key: str) -> str | None:
        """Return the last value given for ``key``."""
        return next((one.value for one in reversed(self.overrides) if one.key == key), None)

    def tasks(self) -> list[str] | None:
        """Return the tasks that will run; None if an experiment from elsewhere may choose it."""
        stated = self.value("task")
        if stated is not None:
            names = [name.strip() for name in stated.split(",")] if self.sweeps else [stated]
            # Hydra explains a name that does not exist, and knows patterns such as glob(*).
            return names if set(names) <= set(TASK_CONFIGS) else None
        experiment = self.value("experiment")
        if experiment in (None, "", "null"):
            return [DEFAULT_TASK]
        found: list[str] = []
        for name in str(experiment).split(","):
            path = package_files("flashmoe_mlx.configs").joinpath("experiment", f"{name.strip()}.yaml")
            if not path.is_file():
                return None
            chosen = _OVERRIDE_TASK.search(path.read_text(encoding="utf-8"))
            found.append(chosen[1] if chosen else DEFAULT_TASK)
        return found


def parse(arguments: Sequence[str]) -> CommandLine:
    """Sort arguments into overrides and options.

    Raises:
        InputError: an argument is neither.
    """
    overrides: list[Override] = []
    options: list[str] = []
    for argument in arguments:
        match = _OVERRIDE.fullmatch(argument)
        if match is not None:
            overrides.append(Override(match["sign"], match["key"], match["value"]))
        elif argument.partition("=")[0] in _OPTIONS or (options and options[-1] in _OPTIONS):
            options.append(argument)
        elif argument.startswith("-"):
            raise InputError(f"{argument}: no such option; --help lists what there is", code="unknown_option")
        else:
            raise InputError(f"{argument}: expected key=value; --help lists the keys")
    return CommandLine(overrides, options)


def tidy(arguments: Sequence[str]) -> list[str]:
    """Return arguments that mean to Hydra what ``arguments`` mean to a person: overrides first, then options.

    Raises:
        InputError: a key does not exist, or the task does not read it; or options contradict each other.
    """
    line = parse(arguments)
    _check_options(line)
    if "--shell-completion" in line.flags:
        return [*(f"{one.key}={one.value}" for one in line.overrides), *line.options]
    given = {one.key for one in line.overrides}
    for texts in ("prompt", "prompts"):
        if {texts, "prompt_file"} <= given:
            raise InputError(f"{texts} and prompt_file: give one of them", code="contradiction")
    tasks = line.tasks()
    overrides = [
        _hydra_override(one) if _root(one.key) == "hydra" else _override(one.key, one.value, tasks, line.sweeps)
        for one in line.overrides
    ]
    return overrides + [_option(option) for option in line.options]


def _option(option: str) -> str:
    """Return an option with ``~`` in a folder replaced: shells leave it alone after an equals sign."""
    name, equals, value = option.partition("=")
    return f"{name}={expand_path(value)}" if equals and value.startswith("~") else option


def _check_options(line: CommandLine) -> None:
    """Refuse combinations that Hydra answers with an exception."""
    modes = [flag for flag in line.flags if flag in _MODES]
    if len(set(modes)) > 1:
        raise InputError(f"{' and '.join(modes)}: give one of them", code="contradiction")
    if "--resolve" in line.flags and not {"--cfg", "--help"} & set(line.flags):
        raise InputError("--resolve: belongs to --cfg job", code="contradiction")
    if "--shell-completion" in line.flags and sum(one.key in _COMPLETION for one in line.overrides) != 1:
        raise InputError("--shell-completion: say which shell: install=bash, or uninstall=bash; also zsh and fish")


def _hydra_override(override: Override) -> str:
    """Return an override of Hydra's settings; folders are taken as they stand, but for ``${now:...}`` and the like."""
    sign, key, value = override
    if key == "hydra":
        raise InputError(f"hydra={value}: Hydra's settings have longer names, such as hydra.run.dir=<folder>")
    if key not in _HYDRA_PATHS:
        return f"{sign}{key}={value}"
    quoted = re.fullmatch(r"(['\"])(.*)\1", value, re.DOTALL)  # people know Hydra's own quotes
    folder = re.sub(r"\\(['\"])", r"\1", quoted[2]) if quoted else value
    if key != "hydra.sweep.subdir":
        folder = str(expand_path(folder))
    return f"{sign}{key}={quoted_reference(f'./{folder}' if folder == _MISSING else folder)}"


def _override(key: str, value: str, tasks: Collection[str] | None, sweeps: bool) -> str:
    _check_key(key, tasks)
    if key in GROUPS:
        return _group_override(key, value, sweeps)
    if key in TEXT_KEYS:
        return _text_override(key, value, sweeps)
    if _root(key) == "backend":
        value = _backend_value(key, value, sweeps)
    elif key == "prompts":
        value = _list_of_texts(key, value)
    # "++" sets a key whether it is there or not. What should not be there is refused later, by those who know.
    return f"++{key}={value}"


def _check_key(key: str, tasks: Collection[str] | None) -> None:
    root = _root(key)
    known = sorted({*known_keys(), *GROUPS})
    if root not in known:
        own = sorted({*keys_of(next(iter(tasks))), *GROUPS}) if tasks else known
        close = difflib.get_close_matches(root, own, n=1) or difflib.get_close_matches(root, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(own)}"
        raise InputError(f"{key}: no such key; {hint}", code="unknown_key")
    if root == "task" and key != "task":
        raise InputError(f"{key}: a task is chosen by its name: task={', '.join(TASK_CONFIGS)}", code="unknown_key")
    if root not in ("task", "experiment") and tasks and any(root not in keys_of(task) for task in tasks):
        raise unread_key(root, tasks)


def _group_override(key: str, value: str, sweeps: bool) -> str:
    if value in ("", "null", _MISSING):
        raise InputError(f"{key}={value}: the name is missing; --help lists what there is")
    if key == "model" and ("/" in value or value.endswith(".json")):
        return _text_override("model.path", value, sweeps)  # no configuration could have that name
    if value.startswith(("[", "{")) and key != "experiment":
        advice = f"-m {key}={value.strip('[]{}')} runs one after the other"
        compare = "; task=bench backends=[...] compares them" if key == "backend" else ""
        raise InputError(f"{key}={value}: one {key} a run; {advice}{compare}")
    return f"{key}={value}"  # Hydra has no "++" for the choice of a group


def _text_override(key: str, value: str, sweeps: bool) -> str:
    """Return an override whose value has no meaning to Hydra; several texts for a sweep."""
    texts = separate_texts(value) if sweeps else [value]
    # A path may be null, for none at all; a prompt is a text, whatever it is.
    shown = [text if text == "null" and key != "prompt" else verbatim(text) for text in texts]
    return f"++{key}={','.join(shown)}"


def _backend_value(key: str, value: str, sweeps: bool) -> str:
    """Return the value of an option of a backend: a path is a text, everything else is read as Hydra reads it."""
    if "/" in value or value.startswith("~"):
        return ",".join(map(verbatim, separate_texts(value) if sweeps else [value]))
    try:
        OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        return verbatim(value)
    return value


def _list_of_texts(key: str, value: str) -> str:
    """Return a list of texts whose elements have no meaning to Hydra; other values are left as they are."""
    try:
        texts = OverridesParser.create().parse_override(f"{key}={value}").value()
    except HydraException:
        return value
    if not isinstance(texts, list):
        return value
    return f"[{','.join(verbatim(str(text)) for text in texts)}]"


def _root(key: str) -> str:
    return re.split(r"[./@:]", key, maxsplit=1)[0]
