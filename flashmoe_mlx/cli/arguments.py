"""Arguments of the command line, sorted into overrides (``key=value``) and Hydra's options."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from typing import NamedTuple

from flashmoe_mlx.cli.options import RUN_OPTIONS, is_option, long_name, take_value
from flashmoe_mlx.cli.task_keys import DEFAULT_TASK, key_of_word, task_names
from flashmoe_mlx.errors import InputError

_OVERRIDE = re.compile(r"(?P<sign>\+*)(?P<key>[A-Za-z_][\w./@:-]*)=(?P<value>.*)", re.DOTALL)
_OVERRIDE_TASK = re.compile(r"^\s*- override /?task: *(\w+)", re.MULTILINE)


class Override(NamedTuple):
    """An argument ``key=value``; ``sign`` is Hydra's "+" or "++" before it, or empty."""

    sign: str
    key: str
    value: str


@dataclass(frozen=True)
class CommandLine:
    """Overrides, and Hydra's options followed by their values, each in the order given."""

    overrides: list[Override]
    options: list[str]

    @property
    def flags(self) -> list[str]:
        """The options in their long spelling, without values."""
        return [long_name(argument) for argument in self.options if is_option(argument)]

    @property
    def sweeps(self) -> bool:
        """Whether commas separate the values of several runs."""
        return "--multirun" in self.flags or self.value("hydra.mode") == "MULTIRUN"

    @property
    def runs(self) -> bool:
        """Whether the command line runs tasks; with options such as ``--cfg`` it only prints."""
        return set(self.flags) <= RUN_OPTIONS

    def value(self, key: str) -> str | None:
        """Return the last value given for ``key``."""
        return next((override.value for override in reversed(self.overrides) if override.key == key), None)

    def tasks(self) -> list[str] | None:
        """Return the tasks that will run; None if Hydra or an experiment outside this package decides."""
        stated = self.value("task")
        if stated is not None:
            names = [name.strip() for name in stated.split(",")] if self.sweeps else [stated]
            # Hydra expands patterns such as glob(*), and explains names that do not exist.
            return names if set(names) <= set(task_names()) else None
        experiment = self.value("experiment")
        if experiment in (None, "", "null"):
            return [DEFAULT_TASK]
        found: list[str] = []
        for name in str(experiment).split(","):
            text = experiment_text(name.strip())
            if text is None:
                return None
            chosen = _OVERRIDE_TASK.search(text)
            found.append(chosen[1] if chosen else DEFAULT_TASK)
        return found


def experiment_text(name: str) -> str | None:
    """Return the YAML of an experiment of this package; None if there is no such experiment."""
    path = package_files("flashmoe_mlx.configs").joinpath("experiment", f"{name}.yaml")
    return path.read_text(encoding="utf-8") if re.fullmatch(r"\w+", name) and path.is_file() else None


def parse(arguments: Sequence[str]) -> CommandLine:
    """Sort arguments into overrides and options.

    Raises:
        InputError: an argument is neither an override nor an option.
    """
    overrides: list[Override] = []
    options: list[str] = []
    words: list[tuple[str, str | None]] = []
    before: str | None = None
    remaining = list(reversed(arguments))
    while remaining:
        argument = remaining.pop()
        match = _OVERRIDE.fullmatch(argument)
        if match is not None:
            overrides.append(Override(match["sign"], match["key"], match["value"]))
            before = match["key"]
        elif is_option(argument):
            options.append(argument)
            options += take_value(argument, remaining)
        elif argument.startswith("-"):
            override = argument.lstrip("-")
            hint = (
                f"write keys without dashes: {override}"
                if _OVERRIDE.fullmatch(override)
                else "--help lists keys and options"
            )
            raise InputError(f"{argument}: no such option; {hint}", code="unknown_option")
        else:
            words.append((argument, before))
    tasks = CommandLine(overrides, options).tasks()
    for word, before in words:
        key = key_of_word(word, tasks)
        if key is None:
            raise InputError(f"{word}: expected key=value; {_advice(word, before)}", code="not_an_override")
        overrides.append(Override("", key, word))
    return CommandLine(overrides, options)


def _advice(word: str, before: str | None) -> str:
    """Tell how to write ``word``, which has no key; ``before`` is the key of the override before it."""
    if word in task_names():
        return f"for the task: task={word}"
    if before is not None:
        return f'text with spaces needs quotes: {before}="..."'
    return '--help lists the keys, such as prompt="..."'
