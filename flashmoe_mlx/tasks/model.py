"""The model that a configuration means."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashmoe_mlx.checkpoint.checkpoint import is_gguf
from flashmoe_mlx.checkpoint.support import gguf_advice, is_hub_id, refuse_named_format
from flashmoe_mlx.config import ModelChoice, folder_of
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.pack.demo import demo_with_variants
from flashmoe_mlx.pack.pack import MANIFEST, open_pack
from flashmoe_mlx.pack.synthetic import synthetic_pack
from flashmoe_mlx.tasks.console import byte_progress


def model_folder(choice: ModelChoice, *backends: Mapping[str, Any]) -> Path:
    """Its folder; a synthetic model is made first if it is not there yet, and so are variants of the demo model.

    Args:
        choice: the model.
        *backends: settings of those that will read it: the variants they name.

    Raises:
        InputError: there is no such model.
    """
    if choice.path is not None:
        folder = folder_of(choice.path)
        if is_gguf(folder):
            raise gguf_advice(folder)
        if folder.is_file():
            raise InputError(f"model.path={choice.path}: is a file; give the folder of a pack or a checkpoint")
        if not folder.is_dir():
            if is_hub_id(choice.path) and not folder.parent.is_dir():
                refuse_named_format(choice.path)
            raise InputError(
                f"model.path={choice.path}: no such folder; to get a model from the hub: "
                f"task=pack source=<org>/<name> out={choice.path}"
            )
        return folder
    if choice.synthetic is None and not choice.shipped:
        raise InputError(f"model={choice.name}: set model.path to a pack or a checkpoint")
    cache_dir = cache_folder(choice)
    try:
        with byte_progress() as progress:
            if choice.synthetic is None:
                variants = {str(backend["variant"]) for backend in backends if backend.get("variant") is not None}
                return demo_with_variants(variants, cache_dir, progress)
            return synthetic_pack(choice.name, choice.synthetic, cache_dir, progress).folder
    except OSError as error:
        raise InputError(
            f"{cache_dir}: cannot keep the model there ({error.strerror}); set model.cache_dir or FLASHMOE_CACHE"
        ) from error


def model_identity(folder: Path) -> str:
    """What the model is called, with its revision where a pack says it."""
    if not (folder / MANIFEST).exists():
        return folder.name
    source = open_pack(folder).manifest["source"]
    return "@".join(filter(None, (source["name"], source.get("revision"))))


def cache_folder(choice: ModelChoice) -> Path:
    """Where models that are made here, and what is known of this machine, are kept.

    An empty variable counts as unset, as the XDG specification says.
    """
    if choice.cache_dir is not None:
        return folder_of(choice.cache_dir)
    own = os.environ.get("FLASHMOE_CACHE")
    return folder_of(own) if own else folder_of(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "flashmoe_mlx"
