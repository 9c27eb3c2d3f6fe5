"""Find the published model that a name or hub id denotes, so that estimates need no network."""

import re
from collections.abc import Mapping
from typing import Any

from flashmoe_mlx.models.registry import families

_OTHER_GEOMETRY = re.compile(r"(?:^|[-_./])(?:REAP|pruned?|merged?|upscaled?|tiny|draft)(?=$|[-_.\d])", re.IGNORECASE)
"""Words in the names of derived models whose sizes differ from those of the original."""
_WIDTH = re.compile(r"[-_]([234568])-?bits?(?=$|[-_])", re.IGNORECASE)
_SAME_WEIGHTS = re.compile(
    r"(?:[-_.](?:mlx|bf16|fp16|f16|hf|text|instruct|thinking|dwq|[234568]-?bits?))*", re.IGNORECASE
)
"""Endings of a model's name that change neither its sizes nor its format, except for the width."""


def published_configs() -> Mapping[str, Mapping[str, Any]]:
    """Return the fields of ``config.json`` that determine sizes, by the name of every published model of a family."""
    return {_model_name(hub_id): config for hub_id, config in _by_hub_id().items()}


def known_config(name: str) -> Mapping[str, Any] | None:
    """Return the ``config.json`` of the published model that ``name``, or a hub id, names or was derived from.

    A width in the name ("-8bit") becomes the width of an MLX conversion. Returns None for an unknown model.
    """
    hub_id = original_of(name)
    if hub_id is None:
        return None
    width = _WIDTH.search(name)
    conversion = {} if width is None else {"quantization": {"bits": int(width[1]), "group_size": 64, "mode": "affine"}}
    return {**_by_hub_id()[hub_id], **conversion}


def is_plain_name(name: str) -> bool:
    """Return whether ``known_config`` certainly holds for ``name``: a published name with harmless endings at most."""
    hub_id = original_of(name)
    if hub_id is None:
        return False
    known = _model_name(hub_id)
    ending = name[name.lower().index(known.lower()) + len(known) :]
    return _SAME_WEIGHTS.fullmatch(ending) is not None


def original_of(name: str) -> str | None:
    """Return the hub id of the published model that ``name`` names or was derived from; None for an unknown model."""
    if _OTHER_GEOMETRY.search(name):
        return None
    for hub_id in _by_hub_id():
        if re.search(rf"(?:^|[/_]){re.escape(_model_name(hub_id))}(?:[-_.]|$)", name, re.IGNORECASE):
            return hub_id
    return None


def _by_hub_id() -> Mapping[str, Mapping[str, Any]]:
    return {hub_id: config for family in families() for hub_id, config in family.published.items()}


def _model_name(hub_id: str) -> str:
    return hub_id.rpartition("/")[2]
