"""Open a pack or a published checkpoint as the same kind of object."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.tensors import CheckpointTensors, ResidentTensor, classify_tensors
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.manifest import MANIFEST, RESIDENT
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.models.weights import ResidentTensors
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.plan import state_folder
from flashmoe_mlx.pack.resident import read_resident


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk.

    Attributes:
        folder: its folder.
        config: its geometry.
        resident: its resident tensors.
        experts: its routed experts, by variant.
    """

    folder: Path
    config: ModelConfig
    resident: ResidentTensors
    experts: Mapping[str, ExpertSource]

    def variant(self, name: str | None) -> ExpertSource:
        """Return the experts of a variant.

        Args:
            name: name of the variant; None for the variant with the most bits, the first by name in case of a tie.

        Raises:
            InputError: there is no such variant.
        """
        if name is not None and not isinstance(name, str):
            raise InputError(
                f"backend.variant={name}: must be the name of a variant, for example q4, or null",
                code="option_of_another_type",
            )
        if name is None:
            name = min(self.experts, key=lambda variant: (-self.experts[variant].layout.code_bits, variant))
        if name not in self.experts:
            width, _, quantiser = name.removeprefix("q").partition("-")
            made_by = f" quantiser={quantiser}" if quantiser else ""
            advice = f". Make one: task=pack source={self.folder} bits=[{width}]{made_by}" if width.isdecimal() else ""
            raise InputError(
                f"{self.folder}: no variant {name!r}; it has {', '.join(sorted(self.experts))}{advice}",
                code="unknown_variant",
            )
        return self.experts[name]


def open_model(folder: Path) -> ModelFiles:
    """Open and check the model in ``folder``, without reading weights.

    Raises:
        InputError: there is no model, or it is incomplete, damaged or not supported.
    """
    if (folder / MANIFEST).exists() or (folder / MANIFEST).is_symlink():
        pack = open_pack(folder)
        return ModelFiles(folder, pack.config, _PackResident(pack.resident_path), pack.experts)
    if state_folder(folder).exists():
        raise InputError(
            f"{folder}: packing did not finish; run the same task=pack command again to resume",
            code="unfinished_pack",
        )
    if (folder / RESIDENT).exists():
        raise InputError(
            f"{folder}: a pack without its {MANIFEST}; copy it again, or make it again (task=pack)", code="no_pack"
        )
    checkpoint = Checkpoint.open(folder)
    tensors = classify_tensors(checkpoint)
    bits = tensors.experts.layout.bits
    name = "published" if bits is None else f"q{bits}"
    return ModelFiles(folder, checkpoint.config, _CheckpointResident(checkpoint, tensors), {name: tensors.experts})


class _PackResident:
    """The resident tensors of a pack."""

    def __init__(self, path: Path) -> None:
        loaded = mx.load(str(path))  # MLX reads only headers; a tensor is read when it is evaluated
        assert isinstance(loaded, dict)
        self._tensors = loaded
        self.names = frozenset(loaded)

    def take(self, name: str) -> mx.array:
        return self._tensors.pop(name)


class _CheckpointResident:
    """The resident tensors of a checkpoint under the names and in the form of a pack."""

    def __init__(self, checkpoint: Checkpoint, tensors: CheckpointTensors) -> None:
        self._checkpoint = checkpoint
        self._tensors: dict[str, ResidentTensor] = {tensor.name: tensor for tensor in tensors.vectors}
        self._tensors |= {part.name: part for matrix in tensors.matrices for part in matrix.parts}
        self.names = frozenset(self._tensors)

    def take(self, name: str) -> mx.array:
        return read_resident(self._checkpoint, self._tensors[name])
