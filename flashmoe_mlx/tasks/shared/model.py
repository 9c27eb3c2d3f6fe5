"""Model of a configuration: its folder, which is filled first if the model is made on this machine."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flashmoe_mlx.checkpoint.support import refuse_gguf_file, refuse_hub_id_of_format
from flashmoe_mlx.console.output import byte_progress, show
from flashmoe_mlx.errors import InputError, PackError
from flashmoe_mlx.formats.manifest import MANIFEST
from flashmoe_mlx.made_models.demo import demo_folder, demo_has, demo_with_variants
from flashmoe_mlx.made_models.synthetic import FAMILY, synthetic_pack
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.paths import expand_path, user_cache
from flashmoe_mlx.tasks.shared.keys import ModelChoice

_TIMEOUT = 600.0
"""Seconds to wait for another process that is making the same model."""
_INTERVAL = 0.5


def model_folder(choice: ModelChoice, *backends: Mapping[str, Any]) -> Path:
    """Return the folder of a model; make a synthetic model, or a variant of the demo model, if it is missing.

    Args:
        choice: the model.
        *backends: settings of the backends that will read the model; their ``variant`` must exist.

    Raises:
        InputError: there is no such model.
    """
    if choice.path is not None:
        folder = expand_path(choice.path)
        refuse_gguf_file(folder)
        if folder.is_file():
            raise InputError(f"model.path={choice.path}: not a folder; give the folder of a pack or a checkpoint")
        if not folder.is_dir():
            refuse_hub_id_of_format(choice.path)
            raise InputError(
                f"model.path={choice.path}: no such folder; to download a model from the hub: "
                f"task=pack source=<org>/<name> out={choice.path}"
            )
        return folder
    if choice.synthetic is None and not choice.shipped:
        raise InputError(f"model={choice.name}: set model.path to a pack or a checkpoint")
    variants = {str(backend["variant"]) for backend in backends if backend.get("variant") is not None}
    if choice.synthetic is None and demo_has(variants):
        return demo_folder()  # works without a cache folder
    cache_dir = cache_folder(choice)

    def make() -> Path:
        with byte_progress() as progress:
            if choice.synthetic is None:
                return demo_with_variants(variants, cache_dir, progress)
            return synthetic_pack(choice.name, choice.synthetic, cache_dir, progress, choice.family or FAMILY).folder

    try:
        return _make_or_wait(make)
    except OSError as error:
        raise InputError(
            f"{cache_dir}: cannot write the model there ({error.strerror}); set model.cache_dir or FLASHMOE_CACHE"
        ) from error


def _make_or_wait(make: Callable[[], Path]) -> Path:
    """Make a model, or wait while another process makes it."""
    deadline = time.monotonic() + _TIMEOUT
    waiting = False
    while True:
        try:
            return make()
        except PackError as error:
            if error.code != "pack_in_use" or time.monotonic() > deadline:
                raise
            if not waiting:
                show(f"waiting up to {_TIMEOUT / 60:.0f} minutes for another process that is making this model")
            waiting = True
            time.sleep(_INTERVAL)


def model_identity(folder: Path) -> str:
    """Return the name of the model, with its revision where a pack records it."""
    if not (folder / MANIFEST).exists():
        return folder.name
    source = open_pack(folder).manifest["source"]
    return "@".join(filter(None, (source["name"], source.get("revision"))))


def cache_folder(choice: ModelChoice) -> Path:
    """Return the folder for models made on this machine and for measurements of the machine.

    Raises:
        InputError: no folder is set, and the user has no home folder.
    """
    if choice.cache_dir is not None:
        return expand_path(choice.cache_dir)
    try:
        return user_cache()
    except InputError as error:
        if error.code != "no_home_folder" or os.environ.get("FLASHMOE_CACHE"):
            raise
        raise InputError(
            "no home folder for the cache of models: set HOME, FLASHMOE_CACHE or model.cache_dir", code=error.code
        ) from None
