"""Keys that exclude each other: a task would ignore one of two alternatives."""

import re

from flashmoe_mlx.cli.arguments import CommandLine, experiment_text
from flashmoe_mlx.errors import InputError

_ALTERNATIVES = (
    ("prompt", "prompt_file"),
    ("prompts", "prompt_file"),
    ("experts_k", "experts_ks"),
    ("prefetch", "prefetches"),
    ("backend", "backends"),
    ("backend.variant", "variants"),
    ("model.path", "model.synthetic"),
)
"""Pairs of keys that a task cannot combine."""


def check_alternatives(line: CommandLine) -> None:
    """Check that no two keys of the command line and its experiment exclude each other.

    Raises:
        InputError: both keys of a pair are set.
    """
    stated = {override.key: override.value for override in line.overrides}
    model = stated.pop("model", "")
    if model == "synthetic" or is_path(model):
        stated["model.synthetic" if model == "synthetic" else "model.path"] = model
    experiment = line.value("experiment") or ""
    origins = dict.fromkeys(_keys_of_experiment(experiment), f" (in experiment={experiment})")
    for key, value in stated.items():
        if value == "null" and key != "prompt":
            origins.pop(key, None)
        else:
            origins[key] = ""
    for pair in _ALTERNATIVES:
        found = [[key for key in origins if key == name or key.startswith(f"{name}.")] for name in pair]
        if all(found):
            shown = " and ".join(f"{key}{origins[key]}" for keys in found for key in keys)
            raise InputError(f"{shown}: use only one of them", code="contradiction")


def is_path(model: str) -> bool:
    """Return whether the value of ``model=`` is a path rather than the name of a file in ``configs/model/``."""
    return "/" in model or model.endswith(".json")


def _keys_of_experiment(name: str) -> list[str]:
    """Return the top-level keys that an experiment of this package sets."""
    keys = re.findall(r"^(\w+):", experiment_text(name) or "", re.MULTILINE)
    return [key for key in keys if key != "defaults"]
