"""A checkpoint on the Hugging Face hub, whose shards come to disk one by one as they are needed."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from flashmoe_mlx.checkpoint.checkpoint import Checkpoint, read_config
from flashmoe_mlx.checkpoint.safetensors_header import TensorInfo, tensor_info
from flashmoe_mlx.errors import CheckpointError, FlashMoeError
from flashmoe_mlx.model.config import ModelConfig

_TEXT = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


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
            FlashMoeError: the hub cannot be reached.
        """
        api = HfApi()
        with _Explained(name):
            info = api.model_info(name, revision=revision)
            assert info.sha is not None
            assert info.siblings is not None
            present = {sibling.rfilename for sibling in info.siblings}
            for file in _TEXT:
                if file in present:
                    hf_hub_download(name, file, revision=info.sha, local_dir=folder)
            published = read_config(folder)
            ModelConfig.from_json(published)
            metadata = api.get_safetensors_metadata(name, revision=info.sha)
        tensors: dict[str, TensorInfo] = {}
        for shard, header in metadata.files_metadata.items():
            for tensor, entry in header.tensors.items():
                described = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": list(entry.data_offsets)}
                tensors[tensor] = tensor_info(folder / shard, tensor, described)
        return cls(folder, published, tensors, name, info.sha)

    @property
    def identity(self) -> dict[str, str]:
        """The hub id and the exact commit."""
        return {"name": self._name, "revision": self._revision}

    def ensure(self, shard: str) -> None:
        """Download ``shard`` unless it is there; an interrupted download is continued."""
        if not (self.folder / shard).is_file():
            with _Explained(self._name):
                hf_hub_download(self._name, shard, revision=self._revision, local_dir=self.folder)

    def discard(self, shard: str) -> None:
        """Delete ``shard`` and what the hub's library keeps beside it."""
        super().discard(shard)
        shutil.rmtree(self.folder / ".cache", ignore_errors=True)


class _Explained:
    """Turns the hub's errors into a line."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, HFValidationError):
            raise CheckpointError(f"source={self._name}: not a hub id: {error}") from error
        if isinstance(error, HfHubHTTPError):
            reason = str(error.server_message or error).splitlines()[0]
            raise CheckpointError(f"source={self._name}: {reason} (private models need: hf auth login)") from error
        if isinstance(error, ConnectionError | OfflineModeIsEnabled | OSError) and not isinstance(error, FlashMoeError):
            raise FlashMoeError(
                f"source={self._name}: no such folder here, and the hub cannot be reached ({error})"
            ) from error
