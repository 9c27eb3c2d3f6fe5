"""Normalization of the command line for Hydra.

Hydra accepts one spelling in each situation: ``+key=value`` adds a key, ``key=value`` changes an existing key, options
must not stand between overrides, and commas and apostrophes in a prompt are part of the grammar. Users need to know
none of this.
"""

from collections.abc import Collection, Sequence

from flashmoe_mlx.cli.alternatives import check_alternatives, is_path
from flashmoe_mlx.cli.arguments import Override, parse
from flashmoe_mlx.cli.options import check_options, expand_home
from flashmoe_mlx.cli.quoting import quote_scalars
from flashmoe_mlx.cli.task_keys import GROUPS, check_key, full_key, root_of, text_key
from flashmoe_mlx.cli.values import (
    MISSING_VALUE,
    backend_value,
    folder_value,
    is_readable,
    text_list_value,
    text_value,
)
from flashmoe_mlx.errors import InputError

_FOLDER_KEYS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")


def normalize_argv(arguments: Sequence[str]) -> list[str]:
    """Return arguments that mean to Hydra what ``arguments`` mean to a person: overrides first, then options.

    Raises:
        InputError: a key does not exist or is not read by the task, or options or keys contradict each other.
    """
    line = parse(arguments)
    check_options(line.flags, [override.key for override in line.overrides])
    if "--shell-completion" in line.flags:
        return [*(f"{override.key}={override.value}" for override in line.overrides), *line.options]
    check_alternatives(line)
    tasks = line.tasks()
    overrides = [
        _hydra_override(override)
        if root_of(override.key) == "hydra"
        else _override(override.key, override.value, tasks, line.sweeps)
        for override in line.overrides
    ]
    keys = {override.key for override in line.overrides}
    if "backend._target_" in keys and not keys & {"backend", "experiment"}:
        overrides.insert(0, "backend=auto")  # it has no option that a store of another package could lack
    return overrides + [expand_home(option) for option in line.options]


def _hydra_override(override: Override) -> str:
    """Return an override of Hydra's own settings."""
    sign, key, value = override
    if key == "hydra":
        raise InputError(f"hydra={value}: Hydra's settings have longer names, such as hydra.run.dir=<folder>")
    if key not in _FOLDER_KEYS:
        return f"{sign}{key}={value}"
    return f"{sign}{key}={folder_value(value, expand=key != 'hydra.sweep.subdir')}"


def _override(key: str, value: str, tasks: Collection[str] | None, sweeps: bool) -> str:
    check_key(key, tasks)
    if key in GROUPS:
        return _group_override(key, value, sweeps)
    if not value.lstrip().startswith("{"):
        key = full_key(key, tasks)
    text = text_key(key, tasks)
    if text is not None:
        value = text_list_value(key, value, sweeps) if text.listed else text_value(value, sweeps, text.nullable)
    elif value.lstrip().startswith(("[", "{")) and not is_readable(value):
        value = quote_scalars(value, is_readable)
    elif root_of(key) == "backend":
        value = backend_value(value, sweeps)
    # "++" sets a key whether or not the configuration has it; invalid keys are refused after composition.
    return f"++{key}={value}"


def _group_override(key: str, value: str, sweeps: bool) -> str:
    if value in ("", "null", MISSING_VALUE):
        raise InputError(f"{key}={value}: the name is missing; --help lists the names")
    if key == "model" and is_path(value):
        return f"++model.path={text_value(value, sweeps, nullable=True)}"
    if value.startswith(("[", "{")) and key != "experiment":
        if value.startswith("{"):
            raise InputError(f"{key}={value}: must be a name; set its options one by one, as in {key}.<option>=<value>")
        advice = f"-m {key}={value.strip('[]')} runs them one after the other"
        compare = "; task=bench backends=[...] compares them" if key == "backend" else ""
        raise InputError(f"{key}={value}: a run has one {key}; {advice}{compare}")
    return f"{key}={value}"  # Hydra has no "++" for the choice of a group
