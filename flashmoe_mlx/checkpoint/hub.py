"""A checkpoint on the Hugging Face hub, whose shards are downloaded one by one when they are needed."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)

from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.formats import USE_INSTEAD
from flashmoe_mlx.checkpoint.shards import is_shard_name
from flashmoe_mlx.checkpoint.support import refuse_named_format, refuse_unsupported
from flashmoe_mlx.errors import CheckpointError, FlashMoeError
from flashmoe_mlx.formats.folders import WRITE_ERRORS, explain_write_errors
from flashmoe_mlx.formats.manifest import TEXT_FILES
from flashmoe_mlx.formats.safetensors_header import TensorInfo, tensor_info
from flashmoe_mlx.formats.untrusted import read_object

_CONFIG = "config.json"
_TIMEOUT = 10
"""Seconds to wait for the hub's first answer."""


class HubCheckpoint(Checkpoint):
    """A checkpoint with known headers; ``ensure`` downloads a shard, ``discard`` deletes it."""

    def __init__(
        self, folder: Path, published: Mapping[str, Any], tensors: Mapping[str, TensorInfo], name: str, revision: str
    ) -> None:
        super().__init__(folder, published, tensors)
        self._name = name
        self._revision = revision

    @classmethod
    def open_remote(cls, name: str, revision: str | None, folder: Path) -> "HubCheckpoint":
        """Fetch config, tokenizer and the headers of all shards of ``name`` into ``folder``.

        The config comes first, so that nothing else of an unsupported model is fetched.

        Args:
            name: <organization>/<name>.
            revision: a branch, tag or commit; None for the default branch.
            folder: receives the files.

        Raises:
            CheckpointError: there is no such model, or it is not supported.
            FlashMoeError: the hub cannot be reached, or no space is left.
        """
        refuse_named_format(name)
        api = HfApi()
        with _explained(name):
            commit, present = _listing(api, name, revision, "source")
        with explain_write_errors(folder), _explained(name):
            hf_hub_download(name, _CONFIG, revision=commit, local_dir=folder)
            published = read_object(folder / _CONFIG)
            refuse_unsupported(published, f"source={name}")
            for file in TEXT_FILES:
                if file in present:
                    hf_hub_download(name, file, revision=commit, local_dir=folder)
            metadata = api.get_safetensors_metadata(name, revision=commit)
        tensors: dict[str, TensorInfo] = {}
        for shard, header in metadata.files_metadata.items():
            if not is_shard_name(shard):
                raise CheckpointError(
                    f"source={name}: {shard!r} is not the name of a safetensors file in its folder",
                    code="invalid_index",
                )
            for tensor, entry in header.tensors.items():
                if tensor in tensors:
                    raise CheckpointError(
                        f"source={name}: tensor {tensor} is in {tensors[tensor].shard} and {shard}",
                        code="duplicate_tensor",
                    )
                described = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": list(entry.data_offsets)}
                tensors[tensor] = tensor_info(folder / shard, tensor, described)
        return cls(folder, published, tensors, name, commit)

    @property
    def identity(self) -> dict[str, str]:
        """The hub id and the exact commit."""
        return {"name": self._name, "revision": self._revision}

    def stamps(self) -> dict[str, list[int]]:
        """Return an empty mapping: the commit determines the content of shards."""
        return {}

    def ensure(self, shard: str) -> None:
        """Download ``shard`` unless it is on disk; resume an interrupted download."""
        if not (self.folder / shard).is_file():
            with _explained(self._name):
                hf_hub_download(self._name, shard, revision=self._revision, local_dir=self.folder)


def remote_config(name: str, key: str) -> Mapping[str, Any]:
    """Fetch the ``config.json`` of a model on the hub; without a network, read it from the hub's cache.

    Args:
        name: <organization>/<name>.
        key: the key of the command line that messages name.

    Raises:
        CheckpointError: there is no such model, or it has no config.
        FlashMoeError: the hub cannot be reached.
    """
    try:
        with _explained(name, key):
            # The listing comes first: without a network it fails at once, while a download retries for half a minute.
            commit, _ = _listing(HfApi(), name, None, key)
            return read_object(Path(hf_hub_download(name, _CONFIG, revision=commit)))
    except FlashMoeError as error:
        cached = None
        if error.code == "hub_unreachable":
            with contextlib.suppress(Exception):
                cached = try_to_load_from_cache(name, _CONFIG)
        if not isinstance(cached, str):
            raise
        return read_object(Path(cached))


def _listing(api: HfApi, name: str, revision: str | None, key: str) -> tuple[str, set[str]]:
    """Return the commit and the file names of a repository with a config and safetensors.

    Raises:
        CheckpointError: it has no config or no safetensors.
    """
    info = api.model_info(name, revision=revision, timeout=_TIMEOUT)
    present = {sibling.rfilename for sibling in info.siblings or ()}
    if not any(is_shard_name(file) for file in present):
        gguf = any(file.lower().endswith(".gguf") for file in present)
        problem = "weights in GGUF cannot be read or packed" if gguf else "there are no safetensors files"
        raise CheckpointError(
            f"{key}={name}: {problem}; {USE_INSTEAD}", code="unsupported_format" if gguf else "no_weights"
        )
    if info.sha is None or _CONFIG not in present:
        raise CheckpointError(f"{key}={name}: no {_CONFIG} there: not a model that can be packed", code="no_model")
    return info.sha, present


@contextlib.contextmanager
def _explained(name: str, key: str = "source") -> Iterator[None]:
    """Turn every error of the hub's library into one line, except errors of writing to this disk."""
    try:
        yield
    except FlashMoeError:
        raise
    except HFValidationError as error:
        raise CheckpointError(
            f"{key}={name}: no such folder, and not a hub id: {_line(error)}", code="no_such_model"
        ) from error
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise CheckpointError(f"{key}={name}: {_line(error)}", code="no_weights") from error
    except HfHubHTTPError as error:
        reason = _line(error.server_message or error)
        raise CheckpointError(
            f"{key}={name}: {reason} (private models need: hf auth login)", code="no_such_model"
        ) from error
    except Exception as error:
        # The library also raises the errors of its HTTP client, which have no common base class.
        if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
            raise
        raise FlashMoeError(
            f"{key}={name}: no such folder here, and the hub cannot be reached ({_line(error)})", code="hub_unreachable"
        ) from error


def _line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
