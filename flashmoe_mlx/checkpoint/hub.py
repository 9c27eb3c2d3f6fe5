"""A checkpoint on the Hugging Face hub, whose shards come to disk one by one as they are needed."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)

from flashmoe_mlx.checkpoint.checkpoint import Checkpoint, is_shard_name, read_config
from flashmoe_mlx.checkpoint.safetensors_header import TensorInfo, tensor_info
from flashmoe_mlx.errors import CheckpointError, FlashMoeError
from flashmoe_mlx.pack.files import WRITE_ERRORS, explained_write_errors
from flashmoe_mlx.pack.pack import TEXT_FILES

_CONFIG = "config.json"


class HubCheckpoint(Checkpoint):
    """Headers are known without a download; ``ensure`` downloads a shard, ``discard`` deletes it."""

    def __init__(
        self, folder: Path, published: Mapping[str, Any], tensors: Mapping[str, TensorInfo], name: str, revision: str
    ) -> None:
        super().__init__(folder, published, tensors)
        self._name = name
        self._revision = revision

    @classmethod
    def open_remote(cls, name: str, revision: str | None, folder: Path) -> "HubCheckpoint":
        """Fetch config, tokenizer and the headers of all shards of ``name`` into ``folder``.

        Raises:
            CheckpointError: no such model, or it is not supported.
            FlashMoeError: the hub cannot be reached, or no space is left.
        """
        api = HfApi()
        with explained_write_errors(folder), _explained(name):
            info = api.model_info(name, revision=revision)
            present = {sibling.rfilename for sibling in info.siblings or ()}
            commit = info.sha
            for file in (_CONFIG, *TEXT_FILES):
                if file in present:
                    hf_hub_download(name, file, revision=commit, local_dir=folder)
        if commit is None or _CONFIG not in present:
            raise CheckpointError(f"source={name}: no {_CONFIG} there: not a model that can be packed")
        published = read_config(folder)
        with _explained(name):
            metadata = api.get_safetensors_metadata(name, revision=commit)
        tensors: dict[str, TensorInfo] = {}
        for shard, header in metadata.files_metadata.items():
            if not is_shard_name(shard):
                raise CheckpointError(f"source={name}: {shard!r} is not the name of a safetensors file in its folder")
            for tensor, entry in header.tensors.items():
                if tensor in tensors:
                    raise CheckpointError(f"source={name}: tensor {tensor} is in {tensors[tensor].shard} and {shard}")
                described = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": list(entry.data_offsets)}
                tensors[tensor] = tensor_info(folder / shard, tensor, described)
        return cls(folder, published, tensors, name, commit)

    @property
    def identity(self) -> dict[str, str]:
        """The hub id and the exact commit."""
        return {"name": self._name, "revision": self._revision}

    def stamps(self) -> dict[str, list[int]]:
        """None: shards come and go, and the commit says what they hold."""
        return {}

    def ensure(self, shard: str) -> None:
        """Download ``shard`` unless it is there; an interrupted download is continued."""
        if not (self.folder / shard).is_file():
            with _explained(self._name):
                hf_hub_download(self._name, shard, revision=self._revision, local_dir=self.folder)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn whatever the hub's library raises into a line, but for failures of writing here."""
    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(f"source={name}: not a hub id: {_line(error)}") from error
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise CheckpointError(f"source={name}: {_line(error)}") from error
    except HfHubHTTPError as error:
        reason = _line(error.server_message or error)
        raise CheckpointError(f"source={name}: {reason} (private models need: hf auth login)") from error
    except Exception as error:
        # Besides its own errors the library lets through those of its HTTP client, which have no class in common.
        if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
            raise
        raise FlashMoeError(
            f"source={name}: no such folder here, and the hub cannot be reached ({_line(error)})"
        ) from error


def _line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
