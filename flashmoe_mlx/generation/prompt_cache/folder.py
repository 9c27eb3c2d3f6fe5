"""A folder of conversations of several models, seen from outside: its contents, and their deletion."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flashmoe_mlx.generation.prompt_cache import files


@dataclass(frozen=True, slots=True)
class Kept:
    """The conversations of one model with one set of settings.

    Attributes:
        folder: their folder.
        model: the folder of the model.
        experts_k: routed experts per token.
        kv_bits: the width of keys and values; None for that of activations.
        conversations: their number.
        states: the number of positions from which a prompt can continue.
        tokens: the tokens of all conversations; beginnings that several share count once.
        nbytes: the size of all files.
        used: the time of the latest use, in seconds since 1970; None if there is no conversation.
    """

    folder: Path
    model: str
    experts_k: int | None
    kv_bits: int | None
    conversations: int
    states: int
    tokens: int
    nbytes: int
    used: float | None


def kept(folder: Path) -> Iterator[Kept]:
    """Yield the conversations in ``folder`` by their models and settings; none if it does not exist.

    Raises:
        OSError: the folder cannot be read.
    """
    for entry in sorted(folder.iterdir()) if folder.exists() else []:
        try:
            settings = json.loads((entry / files.SETTINGS).read_bytes())
            model, experts_k, kv_bits = str(settings["model"]), settings["experts_k"], settings["kv_bits"]
        except files.UNREADABLE:
            continue  # not a folder of this cache
        conversations = files.conversation_folders(entry)
        lengths = []
        for file in files.state_files(entry):
            try:
                lengths.append(len(files.read_header(file)["tokens"]))
            except files.UNREADABLE:
                continue
        yield Kept(
            entry,
            model,
            experts_k,
            kv_bits,
            len(conversations),
            len(lengths),
            sum(lengths),
            sum(map(files.folder_size, conversations)),
            conversations[-1].stat().st_mtime if conversations else None,
        )


def clear(folder: Path) -> tuple[list[Kept], list[Kept]]:
    """Delete all conversations in ``folder``; return the deleted ones, and the ones that another process is writing.

    Raises:
        OSError: the folder cannot be read, or a file cannot be deleted.
    """
    deleted, busy = [], []
    for entry in list(kept(folder)):
        held = files.lock(entry.folder)
        if held is None:
            busy.append(entry)
            continue
        try:
            shutil.rmtree(entry.folder)
        finally:
            os.close(held)
        deleted.append(entry)
    return deleted, busy
