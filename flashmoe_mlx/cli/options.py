"""Hydra's options (``-m``, ``--cfg job``, ...): spelling, values, and combinations that contradict each other."""

from collections.abc import Collection, Sequence

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.paths import expand_path

_LONG_NAMES = {
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
_OPTIONS = frozenset(
    (*_LONG_NAMES, *_LONG_NAMES.values(), "--hydra-help", "--version", "--resolve", "--experimental-rerun")
)
"""Options that Hydra's own parser accepts."""
_CHOICES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
_WITH_VALUE = ("--cfg", "--package", "--config-path", "--config-name", "--config-dir", "--experimental-rerun")
"""Options that require a value; the value of ``--info`` is optional."""
_MODES = ("--run", "--multirun", "--cfg", "--info", "--shell-completion")
_COMPLETION = ("install", "uninstall", "query")
RUN_OPTIONS = frozenset({"--run", "--multirun", *_WITH_VALUE} - {"--cfg"})
"""Options that do not replace the run of a task by something else."""


def is_option(argument: str) -> bool:
    """Return whether ``argument`` is one of Hydra's options, with or without ``=value``."""
    return argument.partition("=")[0] in _OPTIONS


def long_name(option: str) -> str:
    """Return the long spelling of an option, without its value."""
    name = option.partition("=")[0]
    return _LONG_NAMES.get(name, name)


def take_value(option: str, remaining: list[str]) -> list[str]:
    """Take the value of ``option`` from the end of ``remaining`` unless it is given after an equals sign.

    Args:
        option: the option as written, perhaps with ``=value``.
        remaining: the arguments after the option, in reverse order; a value is removed from it.

    Returns:
        The value as a list of one argument, or an empty list.

    Raises:
        InputError: a required value is missing, or the option has a value that it does not accept.
    """
    name, equals, value = option.partition("=")
    flag = long_name(option)
    choices = _CHOICES.get(flag)
    if flag not in _WITH_VALUE and flag not in _CHOICES:
        if equals:
            raise InputError(f"{option}: {name} takes no value", code="unknown_option")
        return []
    taken: list[str] = []
    if not equals:
        if remaining and (flag != "--info" or remaining[-1] in _CHOICES["--info"]):
            value = remaining.pop()
            taken.append(value)
        elif flag == "--info":
            return []
    if choices is not None and value not in choices:
        raise InputError(f"{' '.join([option, *taken])}: choose from {', '.join(choices)}", code="unknown_option")
    if not value:
        raise InputError(f"{name}: requires a value", code="unknown_option")
    return taken


def expand_home(option: str) -> str:
    """Replace ``~`` in the value of an option; shells do not expand it after an equals sign."""
    name, equals, value = option.partition("=")
    return f"{name}={expand_path(value)}" if equals and value.startswith("~") else option


def check_options(flags: Sequence[str], keys: Collection[str]) -> None:
    """Check combinations of options that Hydra would answer with an exception.

    Args:
        flags: the options in their long spelling.
        keys: the keys of the overrides on the same command line.

    Raises:
        InputError: the options contradict each other, or one lacks its counterpart.
    """
    modes = [flag for flag in flags if flag in _MODES]
    if len(set(modes)) > 1:
        raise InputError(f"{' and '.join(modes)}: use only one of them", code="contradiction")
    if "--resolve" in flags and not {"--cfg", "--help"} & set(flags):
        raise InputError("--resolve: works only with --cfg job", code="contradiction")
    if "--shell-completion" in flags and sum(key in _COMPLETION for key in keys) != 1:
        raise InputError("--shell-completion: name the shell: install=bash or uninstall=bash; also zsh and fish")
