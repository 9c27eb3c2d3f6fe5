"""Open a pack or a published checkpoint as the same kind of object."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from flashmoe_mlx.adapters.config import AdaptedConfig
from flashmoe_mlx.adapters.loading import AdaptedExperts, PackedTensors, build_adapted, load_lazily
from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.resident import Matrix, ResidentTensor
from flashmoe_mlx.checkpoint.tensors import CheckpointTensors, classify_tensors
from flashmoe_mlx.custom_kernels import Kernels
from flashmoe_mlx.errors import CheckpointError, InputError
from flashmoe_mlx.formats.extents import ExpertSource, Extent
from flashmoe_mlx.formats.manifest import MANIFEST, RESIDENT
from flashmoe_mlx.formats.record import AFFINE
from flashmoe_mlx.formats.safetensors_header import read_header
from flashmoe_mlx.formats.tables import StoredTensor
from flashmoe_mlx.models.config import ModelConfig, ModelSize
from flashmoe_mlx.models.registry import family_of
from flashmoe_mlx.models.runnable import RunnableModel
from flashmoe_mlx.pack.opening import Pack, open_pack
from flashmoe_mlx.pack.plan import state_folder
from flashmoe_mlx.pack.resident import read_resident, without_floats
from flashmoe_mlx.paths import as_argument
from flashmoe_mlx.stores.contract import ExpertStore


class Build(Protocol):
    """Loads the resident weights of a model."""

    def __call__(self, store: ExpertStore, experts_k: int, kernels: Kernels, dtype: mx.Dtype) -> RunnableModel:
        """Return the model, ready to run.

        Args:
            store: serves its routed experts.
            experts_k: routed experts of a token in each layer.
            kernels: the kernels to compute with.
            dtype: the type of activations.
        """
        ...


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk.

    Attributes:
        folder: its folder.
        config: its geometry.
        build: loads its resident weights.
        experts: its routed experts, by variant.
        tool_format: the name of a module in ``text/tool_formats``; None if the model's format is not known.
    """

    folder: Path
    config: ModelSize
    build: Build
    experts: Mapping[str, ExpertSource]
    tool_format: str | None

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
            possible = width.isdecimal() and not isinstance(self.config, AdaptedConfig)
            advice = f". Make one: task=pack source={self.folder} bits=[{width}]{made_by}" if possible else ""
            if isinstance(self.config, AdaptedConfig):
                advice = "; a model that mlx-lm computes keeps its published experts: choose another backend"
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
        if isinstance(pack.config, AdaptedConfig):
            return _open_adapted_pack(pack, pack.config)
        assert isinstance(pack.config, ModelConfig)
        family = family_of(pack.config)
        build = partial(family.build, pack.config, _PackResident(pack.resident_path))
        return ModelFiles(folder, pack.config, build, pack.experts, family.tool_format)
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
    if isinstance(checkpoint.config, AdaptedConfig):
        return _open_adapted(checkpoint, checkpoint.config)
    tensors = classify_tensors(checkpoint)
    if tensors.codes is not None:
        raise CheckpointError(
            f"{folder}: weights quantized with {tensors.codes.name} run from a pack only; make one: task=pack "
            f"{as_argument('source', folder)} out=<folder for the pack>",
            code="needs_pack",
        )
    family = family_of(tensors.config)
    build = partial(family.build, tensors.config, _CheckpointResident(checkpoint, tensors))
    return ModelFiles(folder, tensors.config, build, _by_name(tensors.experts), family.tool_format)


def _open_adapted(checkpoint: Checkpoint, config: AdaptedConfig) -> ModelFiles:
    """Open a checkpoint of a model that MLX-LM runs."""
    experts = AdaptedExperts(load_lazily(checkpoint.folder), config, checkpoint.tensors, checkpoint.extent)
    build = partial(build_adapted, checkpoint.folder, config, experts.layout, None)
    return ModelFiles(checkpoint.folder, config, build, _by_name(experts), None)


def _open_adapted_pack(pack: Pack, config: AdaptedConfig) -> ModelFiles:
    """Open a pack of a model that MLX-LM runs."""
    (experts,) = pack.experts.values()
    packed = PackedTensors(pack.resident_path, experts.layout, experts.num_experts)
    build = partial(build_adapted, pack.folder, config, experts.layout, packed)
    return ModelFiles(pack.folder, config, build, pack.experts, None)


def _by_name(experts: ExpertSource) -> dict[str, ExpertSource]:
    """Return the experts of a checkpoint by the name of their variant."""
    single = experts.layout.single_format
    if single is None or single.bits is None:
        return {"published": experts}
    return {f"q{single.bits}" if single.mode == AFFINE else single.mode: experts}


class _PackResident:
    """The resident tensors of a pack."""

    def __init__(self, path: Path) -> None:
        loaded = mx.load(str(path))  # MLX reads only headers; a tensor is read when it is evaluated
        assert isinstance(loaded, dict)
        self._path = path
        self._tensors = loaded
        self.names = frozenset(loaded)

    def take(self, name: str) -> mx.array:
        return self._tensors.pop(name)

    def stored(self, name: str) -> StoredTensor:
        tensors, start = read_header(self._path)
        tensor = tensors[name]
        return StoredTensor(Extent(self._path, start + tensor.begin, tensor.nbytes), tensor.dtype, tensor.shape)


class _CheckpointResident:
    """The resident tensors of a checkpoint under the names and in the form of a pack."""

    def __init__(self, checkpoint: Checkpoint, tensors: CheckpointTensors) -> None:
        self._checkpoint = checkpoint
        self._tensors: dict[str, ResidentTensor] = {tensor.name: tensor for tensor in (*tensors.vectors, *tensors.kept)}
        self._floats: dict[str, Matrix] = {}
        for matrix in tensors.matrices:
            if matrix.mode == AFFINE:
                self._tensors |= {part.name: part for part in matrix.parts}
            else:
                parts = ("weight", "scales", "biases") if matrix.mode == "mxfp4" else ("weight",)
                self._floats |= {f"{matrix.name}.{part}": matrix for part in parts}
        self.names = frozenset(self._tensors) | self._floats.keys()

    def take(self, name: str) -> mx.array:
        if name in self._floats:
            return without_floats(self._checkpoint, self._floats[name])[name]
        return read_resident(self._checkpoint, self._tensors[name])

    def stored(self, name: str) -> StoredTensor:
        tensor = self._tensors[name].source
        return StoredTensor(self._checkpoint.extent(tensor, 0, tensor.nbytes), tensor.dtype, tensor.shape)
