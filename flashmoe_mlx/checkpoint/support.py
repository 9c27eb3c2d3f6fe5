"""Decide whether a model can be run, for every task alike, before anything is fetched."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashmoe_mlx.adapters import config as adapted
from flashmoe_mlx.adapters.library import INSTALL, MODEL_TYPES, has_experts, is_installed
from flashmoe_mlx.checkpoint.formats import format_in_name, unreadable_format
from flashmoe_mlx.checkpoint.published import original_of
from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.models.config import ModelSize
from flashmoe_mlx.models.registry import find_family, parse_config


def why_not(published: Mapping[str, Any]) -> str | None:
    """Return the reason why the model of this ``config.json`` cannot be run, and the remedy; None if it can be run."""
    error = _error(published)
    return None if error is None else str(error)


def refuse_unsupported(published: Mapping[str, Any], where: object) -> ModelSize:
    """Read the config of a model that can be run.

    Args:
        published: its ``config.json``.
        where: the beginning of messages: a folder, a file or a name on the hub.

    Raises:
        CheckpointError: it cannot be run; the message holds the reason that ``why_not`` gives.
    """
    error = _error(published)
    if error is not None:
        raise CheckpointError(f"{where}: {error}", code=error.code)
    return _parsed(published)


def read_sizes(published: Mapping[str, Any]) -> ModelSize:
    """Read the config of a model of a family, or of a model that MLX-LM runs; the format of its weights is not checked.

    Raises:
        CheckpointError: it cannot be run.
    """
    refusal = _refusal_of_families(published)
    return parse_config(published) if refusal is None else _adapted(published, refusal)


def refuse_named_format(name: str) -> None:
    """Raise CheckpointError if a name on the hub states a format of weights that cannot be read."""
    found = format_in_name(name)
    if found is not None:
        original = original_of(name)
        named = "" if original is None else f" ({original})"
        instead = f"use the original bf16 checkpoint{named}, or an MLX conversion in affine mode"
        raise CheckpointError(
            f"{name}: weights in {found} cannot be read or packed, by its name; {instead}", code="unsupported_format"
        )


def refuse_hub_id_of_format(path: str) -> None:
    """Call ``refuse_named_format`` if ``path``, which does not exist, can only be a name on the hub."""
    if is_hub_id(path) and not Path(path).parent.is_dir():
        refuse_named_format(path)


def refuse_gguf_file(path: Path) -> None:
    """Raise CheckpointError if ``path`` is a GGUF file, by its name or its first bytes."""
    try:
        if not path.is_file():
            return
        with path.open("rb") as file:
            found = path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"
    except OSError:
        return
    if found:
        raise gguf_error(path)


def gguf_error(path: object) -> CheckpointError:
    """Return the error for a GGUF file in place of a checkpoint."""
    return CheckpointError(
        f"{path}: weights in GGUF cannot be read or packed; use the folder of the original safetensors checkpoint, or "
        "of an MLX conversion in affine mode",
        code="unsupported_format",
    )


def is_hub_id(name: str) -> bool:
    """Return whether ``name`` has the form of a repository on the hub: <organization>/<name>."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def _error(published: Mapping[str, Any]) -> CheckpointError | None:
    try:
        _parsed(published)
    except CheckpointError as error:
        return error
    return None


def _parsed(published: Mapping[str, Any]) -> ModelSize:
    """Read the sizes of a model, and check the format of the weights of a family.

    Raises:
        CheckpointError: it cannot be run.
    """
    refusal = _refusal_of_families(published)
    if refusal is not None:  # first: another format of an unsupported model would not help
        return _adapted(published, refusal)
    reason = unreadable_format(published)
    if reason is not None:
        raise CheckpointError(f"config.json: {reason}", code="unsupported_format")
    return parse_config(published)


def _refusal_of_families(published: Mapping[str, Any]) -> CheckpointError | None:
    """Return the error that names the supported models if no family has the model; None if a family has it.

    Raises:
        CheckpointError: the config is not that of a model, or the model has no routed experts.
    """
    try:
        find_family(published)
    except CheckpointError as error:
        if error.code != "unsupported_model":
            raise
        return error
    return None


def _adapted(published: Mapping[str, Any], refusal: CheckpointError) -> ModelSize:
    """Read the config of a model that MLX-LM runs.

    Raises:
        CheckpointError: ``refusal``, or MLX-LM is not installed (code "mlx_lm_missing").
    """
    name = published["model_type"]
    if has_experts(name):
        return adapted.parse_config(published)
    if name in MODEL_TYPES and not is_installed():
        raise CheckpointError(
            f"config.json: models of type {name} run through mlx-lm, which is not installed: {INSTALL}",
            code="mlx_lm_missing",
        )
    raise refusal
