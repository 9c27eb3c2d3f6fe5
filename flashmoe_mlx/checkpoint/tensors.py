"""Classify the tensors of a published checkpoint: resident, routed expert, or unused.

Three layouts are published. mlx-community: routed experts stacked as ``switch_mlp``, norms as factors, usually
quantised. Hugging Face: experts fused as ``experts.gate_up_proj`` [experts, 2 * size, hidden], or one tensor each as
transformers 5 saves them; norms less 1. Sources: mlx_lm ``models/qwen3_5_moe.py``, transformers
``modeling_qwen3_5_moe.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.formats import USE_INSTEAD, format_of_tensors, mlx_mode, mlx_settings
from flashmoe_mlx.checkpoint.names import canonical_name, is_skipped, said_of_missing
from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.extents import Extent
from flashmoe_mlx.formats.fields import shown
from flashmoe_mlx.formats.record import PROJECTIONS, RecordLayout
from flashmoe_mlx.formats.safetensors_header import TensorInfo
from flashmoe_mlx.models.parameters import Kind, Parameter, quantisation_of, resident_parameters

_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class ResidentTensor:
    """A tensor in the form that the model uses: ``source`` in shape ``shape``, plus 1 if ``add_one``."""

    name: str
    shape: tuple[int, ...]
    source: TensorInfo
    add_one: bool = False


@dataclass(frozen=True, slots=True)
class Matrix:
    """A resident matrix: dense [out, in], or quantised if it has ``scales`` and ``biases``."""

    name: str
    shape: tuple[int, ...]
    weight: ResidentTensor
    scales: ResidentTensor | None = None
    biases: ResidentTensor | None = None

    @property
    def parts(self) -> tuple[ResidentTensor, ...]:
        """The stored tensors."""
        return tuple(part for part in (self.weight, self.scales, self.biases) if part is not None)


@dataclass(frozen=True)
class CheckpointTensors:
    """The tensors of a checkpoint by purpose; ``skipped`` names those without a use for text."""

    matrices: tuple[Matrix, ...]
    vectors: tuple[ResidentTensor, ...]
    experts: "CheckpointExperts"
    skipped: tuple[str, ...]


class CheckpointExperts:
    """The routed experts of a checkpoint, as a source of records."""

    def __init__(self, checkpoint: Checkpoint, layout: RecordLayout, layers: "Sequence[_LayerExperts]") -> None:
        self.layout = layout
        self.num_layers = len(layers)
        self.num_experts = checkpoint.config.num_experts
        self._checkpoint = checkpoint
        self._layers = layers

    def extents(self, layer: int, expert: int) -> list[Extent]:
        """Locate the components of an expert, in the order of its record."""
        return [self._checkpoint.extent(*piece) for piece in self._layers[layer].pieces(expert)]

    def shards(self, layer: int) -> set[str]:
        """Return the names of the shards that hold experts of ``layer``."""
        return self._layers[layer].shards()


class _Stacked:
    """Tensors ``[experts, ...]`` with a row for each expert; projections may share a tensor, one after the other."""

    def __init__(self, pieces: Sequence[tuple[TensorInfo, int, int]]) -> None:
        self._pieces = pieces  # (tensor, offset inside an expert's row, bytes)

    def pieces(self, expert: int) -> list[tuple[TensorInfo, int, int]]:
        return [
            (tensor, expert * (tensor.nbytes // tensor.shape[0]) + offset, nbytes)
            for tensor, offset, nbytes in self._pieces
        ]

    def shards(self) -> set[str]:
        return {tensor.shard for tensor, _, _ in self._pieces}


class _Separate:
    """One tensor for each projection of each expert."""

    def __init__(self, tensors: Sequence[Sequence[TensorInfo]]) -> None:
        self._tensors = tensors

    def pieces(self, expert: int) -> list[tuple[TensorInfo, int, int]]:
        return [(tensor, 0, tensor.nbytes) for tensor in self._tensors[expert]]

    def shards(self) -> set[str]:
        return {tensor.shard for tensors in self._tensors for tensor in tensors}


_LayerExperts = _Stacked | _Separate


def sort_tensors(checkpoint: Checkpoint) -> CheckpointTensors:
    """Find every tensor of the model in ``checkpoint``.

    Raises:
        CheckpointError: a tensor is missing, has another shape than the config says, or is not known.
    """
    return _Sorter(checkpoint).sort()


class _Sorter:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._skipped = tuple(sorted(name for name in checkpoint.tensors if is_skipped(name)))
        self._published: dict[str, str] = {}
        for name in checkpoint.tensors.keys() - set(self._skipped):
            canonical = canonical_name(name)
            if canonical in self._published:
                raise CheckpointError(
                    f"{self._where}: {name} and {self._published[canonical]} are the same tensor",
                    code="duplicate_tensor",
                )
            self._published[canonical] = name
        self._unused = set(self._published)
        self._settings = mlx_settings(checkpoint.published)
        self._is_mlx = any(".mlp.switch_mlp." in name for name in self._published)

    @property
    def _where(self) -> str:
        return str(self._checkpoint.folder)

    def sort(self) -> CheckpointTensors:
        layers, layouts = [], []
        for layer in range(self._config.num_layers):
            experts, layout = self._layer_experts(f"model.layers.{layer}.mlp.")
            layers.append(experts)
            layouts.append(layout)
            if layout != layouts[0]:
                raise CheckpointError(
                    f"{self._where}: experts of layer {layer} are stored as {_described(layout)}, those of layer 0 as "
                    f"{_described(layouts[0])}; experts of mixed precision are not supported, {USE_INSTEAD} with one "
                    "width for all experts",
                    code="mixed_precision",
                )
        matrices, vectors = [], []
        for parameter in resident_parameters(self._config):
            if parameter.kind is Kind.MATRIX:
                matrices.append(self._matrix(parameter))
            else:
                vectors.append(self._vector(parameter))
        if self._config.tie_word_embeddings:
            # Some conversions store the tied head as well; it is the embedding again.
            self._unused -= {"lm_head.weight", "lm_head.scales", "lm_head.biases"}
        if self._unused:
            unknown = self._published[min(self._unused)]
            raise CheckpointError(
                f"{self._where}: tensor {unknown} is not part of this kind of model ({len(self._unused)} such)"
                f"{self._what_it_is()}",
                code="unknown_tensor",
            )
        routed = CheckpointExperts(self._checkpoint, layouts[0], layers)
        return CheckpointTensors(tuple(matrices), tuple(vectors), routed, self._skipped)

    def _find(self, name: str, shape: tuple[int, ...] | None, dtypes: Sequence[str] = _FLOATS) -> TensorInfo:
        if name not in self._published:
            raise self._missing(name)
        self._unused.discard(name)
        tensor = self._checkpoint.tensors[self._published[name]]
        if shape is not None and tensor.shape != shape:
            raise CheckpointError(
                f"{self._where}: tensor {name} has shape {list(tensor.shape)}, config.json needs {list(shape)}",
                code="wrong_shape",
            )
        if tensor.dtype not in dtypes:
            raise CheckpointError(
                f"{self._where}: tensor {name} has type {tensor.dtype}, expected {' or '.join(dtypes)}"
                f"{self._what_it_is()}",
                code="unsupported_tensor_type",
            )
        return tensor

    def _missing(self, name: str) -> CheckpointError:
        found = self._what_it_is() or said_of_missing(name, self._published)
        return CheckpointError(f"{self._where}: tensor {name} is missing{found}", code="missing_tensor")

    def _what_it_is(self) -> str:
        """Return the end of a message where the tensors reveal a format that cannot be read, else nothing."""
        tensors = self._checkpoint.tensors
        found = format_of_tensors((name, tensors[name].dtype) for name in self._published.values())
        return "" if found is None else f"; the tensors are those of {found}, which is not supported: {USE_INSTEAD}"

    def _vector(self, parameter: Parameter) -> ResidentTensor:
        shape = parameter.shape
        if parameter.kind is Kind.CONV and not self._is_mlx:
            shape = (shape[0], shape[2], shape[1])
        add_one = parameter.kind is Kind.NORM and not self._is_mlx
        return ResidentTensor(parameter.name, parameter.shape, self._find(parameter.name, shape), add_one)

    def _matrix(self, parameter: Parameter) -> Matrix:
        name = parameter.name
        if f"{name}.scales" not in self._published:
            weight = self._find(f"{name}.weight", parameter.shape)
            return Matrix(name, parameter.shape, ResidentTensor(f"{name}.weight", parameter.shape, weight))
        weight, scales, biases = self._quantised(name, parameter.shape)[0]
        return Matrix(
            name,
            parameter.shape,
            ResidentTensor(f"{name}.weight", weight.shape, weight),
            ResidentTensor(f"{name}.scales", scales.shape, scales),
            ResidentTensor(f"{name}.biases", biases.shape, biases),
        )

    def _quantised(
        self, name: str, dense: tuple[int, ...]
    ) -> tuple[tuple[TensorInfo, TensorInfo, TensorInfo], int, int]:
        self._refuse_other_mode(name, dense[-1])
        weight = self._find(f"{name}.weight", None, ("U32",))
        scales = self._find(f"{name}.scales", None)
        biases = self._find(f"{name}.biases", scales.shape, (scales.dtype,))
        bits, group_size = quantisation_of(f"{self._where}: {name}", dense, weight.shape, scales.shape)
        self._check_stated_quantisation(name, bits, group_size)
        return (weight, scales, biases), bits, group_size

    def _refuse_other_mode(self, name: str, columns: int) -> None:
        parts = [self._published.get(f"{name}.{part}") for part in ("weight", "scales")]
        if None in parts:
            return
        mode = mlx_mode(columns, *(self._checkpoint.tensors[part] for part in parts if part is not None))
        if mode is not None:
            raise CheckpointError(
                f"{self._where}: {name} is quantised in MLX's mode {mode!r}, only 'affine' is supported; {USE_INSTEAD}",
                code="unsupported_format",
            )

    def _check_stated_quantisation(self, name: str, bits: int, group_size: int) -> None:
        """Compare with the module's entry in the config; what that leaves out, or sets to null, contradicts nothing."""
        published = self._published[f"{name}.weight"].removesuffix(".weight")
        stated = self._settings.get(published)
        if not isinstance(stated, Mapping):
            return
        found = {"bits": bits, "group_size": group_size}
        for key, value in found.items():
            if stated.get(key) not in (None, value):
                said = " and ".join(f"{key} {shown(stated[key])}" for key in found if stated.get(key) is not None)
                raise CheckpointError(
                    f"{self._where}: config.json says of {published}: {said}; but its shape says {bits} bits in groups "
                    f"of {group_size}",
                    code="contradicting_quantisation",
                )

    def _layer_experts(self, prefix: str) -> tuple[_LayerExperts, RecordLayout]:
        if f"{prefix}switch_mlp.gate_proj.weight" in self._published:
            if f"{prefix}switch_mlp.gate_proj.scales" in self._published:
                return self._stacked_quantised(f"{prefix}switch_mlp.")
            return self._stacked_dense(f"{prefix}switch_mlp.")
        if f"{prefix}experts.gate_up_proj" in self._published:
            return self._fused(f"{prefix}experts.")
        return self._separate(f"{prefix}experts.")

    def _dense_layout(self, tensors: Sequence[TensorInfo]) -> RecordLayout:
        return self._layout(None, None, tensors)

    def _layout(self, bits: int | None, group_size: int | None, typed: Sequence[TensorInfo]) -> RecordLayout:
        dtypes = {tensor.dtype for tensor in typed}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{self._where}: experts of mixed types ({', '.join(sorted(dtypes))}) are not supported",
                code="mixed_precision",
            )
        return RecordLayout(self._config.hidden_size, self._config.expert_size, bits, group_size, dtypes.pop())

    def _shapes(self) -> dict[str, tuple[int, int]]:
        wide = (self._config.expert_size, self._config.hidden_size)
        return {projection: wide[::-1] if projection == "down" else wide for projection in PROJECTIONS}

    def _stacked_quantised(self, prefix: str) -> tuple[_LayerExperts, RecordLayout]:
        tensors: list[TensorInfo] = []
        typed: list[TensorInfo] = []
        formats: set[tuple[int, int]] = set()
        for projection, shape in self._shapes().items():
            parts, bits, group_size = self._quantised(f"{prefix}{projection}_proj", (self._config.num_experts, *shape))
            tensors += parts
            typed += parts[1:]
            formats.add((bits, group_size))
        if len(formats) > 1:
            shown = " and ".join(f"{bits} bits in groups of {group_size}" for bits, group_size in sorted(formats))
            raise CheckpointError(
                f"{self._where}: {prefix}: projections of mixed precision ({shown}) are not supported; "
                f"{USE_INSTEAD} with one width for all experts",
                code="mixed_precision",
            )
        return _stacked(tensors), self._layout(*formats.pop(), typed)

    def _stacked_dense(self, prefix: str) -> tuple[_LayerExperts, RecordLayout]:
        experts = self._config.num_experts
        tensors = [self._find(f"{prefix}{p}_proj.weight", (experts, *shape)) for p, shape in self._shapes().items()]
        return _stacked(tensors), self._dense_layout(tensors)

    def _fused(self, prefix: str) -> tuple[_LayerExperts, RecordLayout]:
        experts, size, hidden = self._config.num_experts, self._config.expert_size, self._config.hidden_size
        gate_up = self._find(f"{prefix}gate_up_proj", (experts, 2 * size, hidden))
        down = self._find(f"{prefix}down_proj", (experts, hidden, size))
        half = gate_up.nbytes // experts // 2
        pieces = [(gate_up, 0, half), (gate_up, half, half), (down, 0, down.nbytes // experts)]
        return _Stacked(pieces), self._dense_layout([gate_up, down])

    def _separate(self, prefix: str) -> tuple[_LayerExperts, RecordLayout]:
        tensors = [
            [self._find(f"{prefix}{expert}.{p}_proj.weight", shape) for p, shape in self._shapes().items()]
            for expert in range(self._config.num_experts)
        ]
        return _Separate(tensors), self._dense_layout([tensor for expert in tensors for tensor in expert])


def _stacked(tensors: Sequence[TensorInfo]) -> _Stacked:
    return _Stacked([(tensor, 0, tensor.nbytes // tensor.shape[0]) for tensor in tensors])


def _described(layout: RecordLayout) -> str:
    if layout.bits is None:
        return layout.dtype
    return f"{layout.bits} bits in groups of {layout.group_size} with scales in {layout.dtype}"
