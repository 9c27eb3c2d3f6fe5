"""Find the family of a model, or explain why this package does not run the model."""

import pkgutil
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from flashmoe_mlx import models
from flashmoe_mlx.errors import CheckpointError, InputError
from flashmoe_mlx.formats.fields import shown
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.models.family import Family
from flashmoe_mlx.models.other_models import DENSE, MIXTURES

_COUNT_OF_EXPERTS = re.compile(r"(moe_)?n(um)?_(\w+_)?experts")


@cache
def families() -> tuple[Family[Any], ...]:
    """Return all families, sorted by module: the ``FAMILY`` of each module in ``models`` that has one.

    Raises:
        ValueError: two families have a ``model_type`` or a class of configurations in common.
    """
    modules = (import_module(f"{models.__name__}.{found.name}") for found in pkgutil.iter_modules(models.__path__))
    found = tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))
    owned = Counter(key for family in found for key in (*family.model_types, family.config.__name__))
    shared = [key for key, count in owned.items() if count > 1]
    if shared:
        raise ValueError(f"{models.__name__}: several families have {', '.join(shared)}; a model has one family")
    return found


def named_family(model_type: str) -> Family[Any]:
    """Return the family with this ``model_type``.

    Raises:
        InputError: there is none; code "unknown_family".
    """
    for family in families():
        if model_type in family.model_types:
            return family
    known = ", ".join(family.model_types[0] for family in families())
    raise InputError(f"model.family={model_type}: no such family; choose from {known}", code="unknown_family")


def family_of(config: ModelConfig) -> Family[Any]:
    """Return the family of the model with this configuration."""
    return next(family for family in families() if family.config is type(config))


def parse_config(published: Mapping[str, Any]) -> ModelConfig:
    """Read a ``config.json``.

    Raises:
        CheckpointError: the model belongs to no family, a field asks for unsupported arithmetic, or a value is missing,
            mistyped or out of range.
    """
    config: ModelConfig = find_family(published).parse_config(published)
    return config


def find_family(published: Mapping[str, Any]) -> Family[Any]:
    """Return the family of the model that a ``config.json`` describes.

    Raises:
        CheckpointError: the model belongs to no family.
    """
    kind = published.get("model_type")
    if kind is None:
        raise CheckpointError("config.json: model_type is missing: not the config of a model", code="invalid_config")
    text = published.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    family = next((family for family in families() if kind in family.model_types), None)
    if family is None:
        raise _unsupported(published, kind)
    if inner is not None and inner not in family.model_types:
        if any(inner in other.model_types for other in families()):
            raise CheckpointError(
                f"config.json: text_config has model_type {shown(inner)} inside model_type {shown(kind)}: a "
                "combination that this version does not run",
                code="unsupported_model",
            )
        raise _unsupported(published, inner)
    return family


def _unsupported(published: Mapping[str, Any], model_type: object) -> CheckpointError:
    """Return the error for a model of ``model_type``."""
    name = model_type if isinstance(model_type, str) else ""
    supported = _supported()
    if name not in MIXTURES and not _has_experts(published):
        called = f" ({DENSE[name]})" if name in DENSE else ""
        return CheckpointError(
            f"config.json: model_type {shown(model_type)}{called} is a dense model: its config names no experts, so "
            f"there is nothing to stream; use mlx-lm for it. {supported[0].upper()}{supported[1:]}",
            code="dense_model",
        )
    called = f" ({MIXTURES[name]})" if name in MIXTURES else ""
    return CheckpointError(
        f"config.json: model_type {shown(model_type)}{called} is not supported; {supported}", code="unsupported_model"
    )


def _supported() -> str:
    """Return the end of a message, which names the series of models that this version runs."""
    series = [name for family in families() for name in family.series]
    example = families()[0].example
    return f"this version runs the mixture-of-experts models of {_listed(series)} ({example}, for example)"


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _has_experts(holder: Mapping[str, Any], depth: int = 3) -> bool:
    """Return whether a config counts experts, itself or in a part (text_config, llm_config, thinker_config)."""
    parts = [value for value in holder.values() if isinstance(value, Mapping)] if depth else []
    counted = any(value and _COUNT_OF_EXPERTS.fullmatch(name) for name, value in holder.items())
    return counted or any(_has_experts(part, depth - 1) for part in parts)
