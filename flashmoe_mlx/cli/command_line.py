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

from flashmoe_mlx.cli.composition import GROUPS, unread_key
from flashmoe_mlx.cli.quoting import elements, quote_scalars, quoted_reference, separate_texts, verbatim
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.tasks.keys import DEFAULT_TASK, TASK_CONFIGS, TEXT_KEYS, keys_of, known_keys

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
_CHOICES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
_WITH_VALUE = ("--cfg", "--package", "--config-path", "--config-name", "--config-dir", "--experimental-rerun")
"""Options that need a value; ``--info`` may have one."""
_MODES = ("--run", "--multirun", "--cfg", "--info", "--shell-completion")
_COMPLETION = ("install", "uninstall", "query")
_HYDRA_PATHS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
_ALTERNATIVES = (
    ("prompt", "prompt_file"),
    ("prompts", "prompt_file"),
    ("experts_k", "experts_ks"),
    ("prefetch", "prefetches"),
    ("backend", "backends"),
    ("backend.variant", "variants"),
    ("model.path", "model.synthetic"),
)
"""Pairs of keys of which a task would ignore the first or the second."""
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

    @property
    def runs(self) -> bool:
        """Whether tasks run: no option asks for something else."""
        return set(self.flags) <= {"--run", "--multirun", *_WITH_VALUE} - {"--cfg"}

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
    left = list(reversed(arguments))
    while left:
        argument = left.pop()
        match = _OVERRIDE.fullmatch(argument)
        if match is not None:
            overrides.append(Override(match["sign"], match["key"], match["value"]))
        elif argument.partition("=")[0] in _OPTIONS:
            options.append(argument)
            options += _option_value(argument, left)
        elif argument.startswith("-"):
            meant = argument.lstrip("-")
            hint = f"keys have no dashes: {meant}" if _OVERRIDE.fullmatch(meant) else "--help lists what there is"
            raise InputError(f"{argument}: no such option; {hint}", code="unknown_option")
        else:
            raise InputError(f"{argument}: expected key=value; --help lists the keys", code="not_an_override")
    return CommandLine(overrides, options)


def _option_value(option: str, left: list[str]) -> list[str]:
    """Take the value of an option from the arguments that are ``left``, unless it follows an equals sign."""
    name, equals, value = option.partition("=")
    flag = _FLAGS.get(name, name)
    choices = _CHOICES.get(flag)
    if flag not in _WITH_VALUE and flag not in _CHOICES:
        if equals:
            raise InputError(f"{option}: {name} takes no value", code="unknown_option")
        return []
    taken: list[str] = []
    if not equals:
        if left and (flag != "--info" or left[-1] in _CHOICES["--info"]):
            value = left.pop()
            taken.append(value)
        elif flag == "--info":
            return []
    if choices is not None and value not in choices:
        raise InputError(f"{' '.join([option, *taken])}: choose from {', '.join(choices)}", code="unknown_option")
    if not value:
        raise InputError(f"{name}: its value is missing", code="unknown_option")
    return taken


def tidy(arguments: Sequence[str]) -> list[str]:
    """Return arguments that mean to Hydra what ``arguments`` mean to a person: overrides first, then options.

    Raises:
        InputError: a key does not exist, or the task does not read it; or options contradict each other.
    """
    line = parse(arguments)
    _check_options(line)
    if "--shell-completion" in line.flags:
        return [*(f"{one.key}={one.value}" for one in line.overrides), *line.options]
    _check_alternatives(line)
    tasks = line.tasks()
    overrides = [
        _hydra_override(one) if _root(one.key) == "hydra" else _override(one.key, one.value, tasks, line.sweeps)
        for one in line.overrides
    ]
    return overrides + [_option(option) for option in line.options]


def _check_alternatives(line: CommandLine) -> None:
    """Refuse two keys of which one would be ignored, also where a study sets one of them."""
    stated = {one.key: one.value for one in line.overrides}
    model = stated.pop("model", "")
    if model == "synthetic" or _is_path(model):
        stated["model.synthetic" if model == "synthetic" else "model.path"] = model
    study = line.value("experiment") or ""
    places = dict.fromkeys(_keys_of_study(study), f" (in experiment={study})")
    for key, value in stated.items():
        if value == "null" and key != "prompt":
            places.pop(key, None)
        else:
            places[key] = ""
    for pair in _ALTERNATIVES:
        found = [key for one in pair for key in places if key == one or key.startswith(f"{one}.")]
        if all(any(key == one or key.startswith(f"{one}.") for key in found) for one in pair):
            shown = " and ".join(f"{key}{places[key]}" for key in found)
            raise InputError(f"{shown}: only one of them can be used", code="contradiction")


def _keys_of_study(name: str) -> list[str]:
    """Return the top-level keys that an experiment of this package sets."""
    path = package_files("flashmoe_mlx.configs").joinpath("experiment", f"{name}.yaml")
    if not re.fullmatch(r"\w+", name) or not path.is_file():
        return []
    return [key for key in re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), re.MULTILINE) if key != "defaults"]


def _is_path(model: str) -> bool:
    """Whether the value of ``model=`` is a path: no configuration could have that name."""
    return "/" in model or model.endswith(".json")


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
    if key == "prompts":
        value = _list_of_texts(key, value, sweeps)
    elif value.lstrip().startswith(("[", "{")) and not _readable(value):
        value = quote_scalars(value, _readable)
    elif _root(key) == "backend":
        value = _backend_value(value, sweeps)
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
    if key == "model" and _is_path(value):
        return _text_override("model.path", value, sweeps)
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


def _backend_value(value: str, sweeps: bool) -> str:
    """Return the value of an option of a backend: a path is a text, everything else is read as Hydra reads it."""
    if "/" in value or value.startswith("~"):
        return ",".join(map(verbatim, separate_texts(value) if sweeps else [value]))
    return value if _readable(value) else verbatim(value)


def _readable(value: str) -> bool:
    """Whether Hydra's grammar has a reading of ``value``."""
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return False
    return True


def _list_of_texts(key: str, value: str, sweeps: bool) -> str:
    """Return a list of texts whose elements have no meaning to Hydra; other values are left as they are."""
    inner = value.strip()
    listed = inner.startswith("[") and inner.endswith("]") and bool(inner[1:-1].strip())
    written = elements(inner[1:-1]) if listed else []
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}").value()
    except HydraException:
        if not listed or sweeps:
            return value
        parsed = written
    if not isinstance(parsed, list) or any(isinstance(one, list | dict) for one in parsed):
        return value  # a sweep over lists, or what the check of types refuses
    if len(written) == len(parsed):  # null, 007 and the like are texts, too
        parsed = [one if isinstance(one, str) else text for one, text in zip(parsed, written, strict=True)]
    return f"[{','.join(verbatim(str(text)) for text in parsed)}]"


def _root(key: str) -> str:
    return re.split(r"[./@:]", key, maxsplit=1)[0]
