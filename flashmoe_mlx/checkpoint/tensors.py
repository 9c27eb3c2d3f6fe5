"""Classify the tensors of a published checkpoint: resident, routed expert, or unused.

Three layouts are published, under the names that the model's family gives (``TensorNames``). mlx-community stacks the
experts of a layer and usually quantizes them. Hugging Face fuses gate and up projections of all experts of a layer, or
stores a tensor for each projection of each expert.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.coded_formats import Codes
from flashmoe_mlx.checkpoint.experts import CheckpointExperts, LayerExperts, SeparateExperts, StackedExperts
from flashmoe_mlx.checkpoint.formats import USE_INSTEAD, coded_weights, format_of_tensors, mlx_mode, mlx_settings
from flashmoe_mlx.checkpoint.names import canonical_name, describe_found, is_skipped
from flashmoe_mlx.checkpoint.resident import Matrix, ResidentTensor
from flashmoe_mlx.errors import CheckpointError, InputError
from flashmoe_mlx.formats.fields import shown
from flashmoe_mlx.formats.record import AFFINE, FLOAT_MODES, PROJECTIONS, LayerLayouts, MatrixFormat, RecordLayout
from flashmoe_mlx.formats.safetensors_header import TensorInfo
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.models.parameters import EMBEDDING, HEAD, Kind, Parameter, part_names, quantization_of
from flashmoe_mlx.models.registry import family_of

_FLOATS = ("BF16", "F16", "F32")
_SAMPLE_BYTES = 2**16
"""Size of each sample of a stored head; see ``_check_tied_head``."""


@dataclass(frozen=True)
class CheckpointTensors:
    """The tensors of a checkpoint by purpose.

    Attributes:
        config: the geometry of the model.
        matrices: resident matrices.
        vectors: other resident tensors.
        kept: tensors that stay on disk as they are published: tables, and tensors that no part of this version uses.
        experts: routed experts.
        skipped: names of tensors that text does not need.
        codes: the format from which weights are decoded; None if they are read as they are published.
    """

    config: ModelConfig
    matrices: tuple[Matrix, ...]
    vectors: tuple[ResidentTensor, ...]
    kept: tuple[ResidentTensor, ...]
    experts: CheckpointExperts
    skipped: tuple[str, ...]
    codes: Codes | None


def classify_tensors(checkpoint: Checkpoint) -> CheckpointTensors:
    """Find every tensor of the model in ``checkpoint``.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or type than the config needs.
    """
    return _Classifier(checkpoint).classify()


class _Classifier:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        if not isinstance(checkpoint.config, ModelConfig):
            raise CheckpointError(
                f"{checkpoint.folder}: a model that runs through mlx-lm has no packs; run it from its checkpoint "
                "(backend=checkpoint, pread, ram_hybrid or resident)",
                code="not_for_mlx_lm",
            )
        self._config = checkpoint.config
        self._names = family_of(self._config).tensor_names
        self._codes = coded_weights(checkpoint.published)
        published = checkpoint.tensors
        self._tensors = published if self._codes is None else self._codes.decoded(published, self._where)
        self._skipped = tuple(sorted(name for name in self._tensors if is_skipped(name, self._names)))
        self._published: dict[str, str] = {}
        for name in self._tensors.keys() - set(self._skipped):
            canonical = canonical_name(name, self._names)
            if canonical in self._published:
                raise CheckpointError(
                    f"{self._where}: {name} and {self._published[canonical]} are the same tensor",
                    code="duplicate_tensor",
                )
            self._published[canonical] = name
        self._unused = set(self._published)
        self._settings = mlx_settings(checkpoint.published)
        stacked = {self._stacked(layer, "gate") for layer in self._config.moe_layers}
        self._is_mlx = not stacked.isdisjoint(name.rpartition(".")[0] for name in self._published)

    @property
    def _where(self) -> str:
        return str(self._checkpoint.folder)

    def classify(self) -> CheckpointTensors:
        layers, layouts = [], []
        for layer in self._config.moe_layers:
            experts, layout = self._layer_experts(layer)
            layers.append(experts)
            layouts.append(layout)
        matrices, vectors = [], []
        for parameter in self._config.resident_parameters():
            if parameter.kind is Kind.MATRIX:
                matrices.append(self._matrix(parameter))
            else:
                vectors.append(self._vector(parameter))
        kept = [*self._tables(), *self._kept()]
        if self._config.tie_word_embeddings:
            self._check_tied_head()
            self._unused -= {f"{HEAD}.{part}" for part in ("weight", "scales", "biases")}
        if self._unused:
            unknown, count = self._published[min(self._unused)], len(self._unused)
            raise CheckpointError(
                f"{self._where}: tensor {unknown} is not part of this kind of model ({count} unknown tensors)"
                f"{self._unreadable_format()}",
                code="unknown_tensor",
            )
        routed = CheckpointExperts(self._checkpoint, LayerLayouts.of(layouts), layers)
        resident = tuple(matrices), tuple(vectors), tuple(kept)
        return CheckpointTensors(self._config, *resident, routed, self._skipped, self._codes)

    def _check_tied_head(self) -> None:
        """Raise CheckpointError if the stored head is not a copy of the embedding, by samples of both.

        Some conversions store such a copy. A different head belongs to a model without tied embeddings, which
        transformers runs as such, whereas mlx-lm drops the head.
        """
        names = [self._published.get(f"{name}.weight") for name in (HEAD, EMBEDDING)]
        head, embedding = (None if name is None else self._tensors[name] for name in names)
        if head is None or embedding is None or (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
            return
        size = min(_SAMPLE_BYTES, head.nbytes)
        for start in (0, (head.nbytes - size) // 2, head.nbytes - size):
            one, other = (self._checkpoint.read(tensor, start, size) for tensor in (head, embedding))
            if one != other:
                raise CheckpointError(
                    f"{self._where}: config.json ties the head to the embedding, but {names[0]} differs from "
                    f"{names[1]}; set tie_word_embeddings to false in config.json to use the stored head",
                    code="contradicting_head",
                )

    def _tables(self) -> Iterator[ResidentTensor]:
        """Yield the tensors of all tables."""
        for table in self._config.tables:
            names = part_names(table, self._published)
            if not names:
                raise self._missing(f"{table.name}.weight")
            rows = 0
            for name in names:
                height = self._tensors[self._published[f"{name}.weight"]].shape[0]
                matrix = self._matrix(Parameter(name, Kind.MATRIX, (height, table.columns)))
                if matrix.mode != AFFINE:
                    raise CheckpointError(
                        f"{self._where}: table {name} is in {matrix.mode}; only dense tables and tables in MLX's "
                        "affine format are supported",
                        code="unsupported_format",
                    )
                rows += height
                yield from matrix.parts
            if rows < table.rows:
                raise CheckpointError(
                    f"{self._where}: table {table.name} has {rows} rows in {len(names)} parts, config.json needs "
                    f"{table.rows}",
                    code="wrong_shape",
                )

    def _kept(self) -> Iterator[ResidentTensor]:
        """Yield the tensors that no part of this version uses but a pack keeps."""
        pattern = self._names.kept
        for name in sorted(self._unused):
            if pattern is not None and pattern.search(name):
                self._unused.discard(name)
                tensor = self._tensors[self._published[name]]
                yield ResidentTensor(name, tensor.shape, tensor)

    def _find(self, name: str, shape: tuple[int, ...] | None, dtypes: Sequence[str] = _FLOATS) -> TensorInfo:
        if name not in self._published:
            raise self._missing(name)
        self._unused.discard(name)
        tensor = self._tensors[self._published[name]]
        if shape is not None and tensor.shape != shape:
            raise CheckpointError(
                f"{self._where}: tensor {name} has shape {list(tensor.shape)}, config.json needs {list(shape)}",
                code="wrong_shape",
            )
        if tensor.dtype not in dtypes:
            raise CheckpointError(
                f"{self._where}: tensor {name} has type {tensor.dtype}, expected {' or '.join(dtypes)}"
                f"{self._unreadable_format()}",
                code="unsupported_tensor_type",
            )
        return tensor

    def _missing(self, name: str) -> CheckpointError:
        found = self._unreadable_format() or describe_found(name, self._published)
        return CheckpointError(f"{self._where}: tensor {name} is missing{found}", code="missing_tensor")

    def _unreadable_format(self) -> str:
        """Return the end of a message if the tensors reveal a format that cannot be read, else an empty text."""
        tensors = self._tensors
        found = format_of_tensors((name, tensors[name].dtype) for name in self._published.values())
        return "" if found is None else f"; the tensors are those of {found}, which is not supported: {USE_INSTEAD}"

    def _vector(self, parameter: Parameter) -> ResidentTensor:
        shape = parameter.shape
        if parameter.kind is Kind.CONV and not self._is_mlx:
            shape = (shape[0], shape[2], shape[1])
        add_one = parameter.kind is Kind.OFFSET_NORM or (parameter.kind is Kind.NORM and not self._is_mlx)
        return ResidentTensor(parameter.name, parameter.shape, self._find(parameter.name, shape), add_one)

    def _matrix(self, parameter: Parameter) -> Matrix:
        published, shape, rows = parameter.name, parameter.shape, None
        if parameter.published is not None:
            published, rows = parameter.published.matrix, parameter.published.ranges
            shape = (parameter.published.height, shape[1])
        mode = self._float_mode(published, shape[-1])
        if mode is not None:
            parts = dict(zip(("weight", "scales"), self._floats(published, shape, mode), strict=True))
        elif f"{published}.scales" in self._published:
            parts = dict(zip(("weight", "scales", "biases"), self._quantized(published, shape)[0], strict=True))
        else:
            parts = {"weight": self._find(f"{published}.weight", shape)}

        def stored(part: str) -> ResidentTensor:
            tensor = parts[part]
            size = (parameter.shape[0], *tensor.shape[1:])
            return ResidentTensor(f"{parameter.name}.{part}", size, tensor, rows=rows)

        return Matrix(parameter.name, parameter.shape, parameter.least_bits, *map(stored, parts), mode=mode or AFFINE)

    def _quantized(
        self, name: str, dense: tuple[int, ...]
    ) -> tuple[tuple[TensorInfo, TensorInfo, TensorInfo], int, int]:
        weight = self._find(f"{name}.weight", None, ("U32",))
        scales = self._find(f"{name}.scales", None)
        biases = self._find(f"{name}.biases", scales.shape, (scales.dtype,))
        try:
            bits, group_size = quantization_of(f"{self._where}: {name}", dense, weight.shape, scales.shape)
        except InputError as error:
            raise CheckpointError(f"{error}, which config.json needs", code="wrong_shape") from None
        self._check_stated_quantization(name, bits, group_size)
        return (weight, scales, biases), bits, group_size

    def _float_mode(self, name: str, columns: int) -> str | None:
        """Return the mode of ``FLOAT_MODES`` in which the matrix ``name`` is quantized, by its shapes, or None."""
        parts = [self._published.get(f"{name}.{part}") for part in ("weight", "scales")]
        if None in parts:
            return None
        return mlx_mode(columns, *(self._tensors[part] for part in parts if part is not None))

    def _floats(self, name: str, dense: tuple[int, ...], mode: str) -> tuple[TensorInfo, TensorInfo]:
        """Return codes and scales of a matrix in a mode of ``FLOAT_MODES``."""
        bits, group_size = FLOAT_MODES[mode]
        weight = self._find(f"{name}.weight", (*dense[:-1], dense[-1] * bits // 32), ("U32",))
        self._check_stated_quantization(name, bits, group_size, mode)
        return weight, self._find(f"{name}.scales", (*dense[:-1], dense[-1] // group_size), ("U8",))

    def _check_stated_quantization(self, name: str, bits: int, group_size: int, mode: str = AFFINE) -> None:
        """Raise CheckpointError if the config contradicts the shapes of a module's tensors.

        An entry of the module is checked as a whole, and without one the mode of the whole model.
        """
        published = self._published[f"{name}.weight"].removesuffix(".weight")
        stated = self._settings.get(published)
        stated_mode = (stated if isinstance(stated, Mapping) else self._settings).get("mode")
        if stated_mode not in (None, mode):
            raise CheckpointError(
                f"{self._where}: config.json states mode {shown(stated_mode)} for {published}, but its tensors are "
                f"those of {mode}",
                code="contradicting_quantisation",
            )
        if not isinstance(stated, Mapping):
            return
        found = {"bits": bits, "group_size": group_size}
        for key, value in found.items():
            if stated.get(key) not in (None, value):
                entry = " and ".join(f"{key} {shown(stated[key])}" for key in found if stated.get(key) is not None)
                raise CheckpointError(
                    f"{self._where}: config.json states {entry} for {published}, but its shape is that of {bits} bits "
                    f"in groups of {group_size}",
                    code="contradicting_quantisation",
                )

    def _stacked(self, layer: int, projection: str) -> str:
        """Return the name of the matrices of all experts of ``layer``, as MLX conversions stack them."""
        return self._expert_name(self._names.stacked, layer, projection)

    def _expert_name(self, template: str, layer: int, projection: str = "", expert: int | None = None) -> str:
        projection = self._names.projections.get(projection, "")
        return self._names.experts.format(layer=layer) + template.format(projection=projection, expert=expert)

    def _layer_experts(self, layer: int) -> tuple[LayerExperts, RecordLayout]:
        if f"{self._stacked(layer, 'gate')}.weight" in self._published:
            return self._stacked_experts(layer)
        if self._expert_name(self._names.fused[0], layer) in self._published:
            return self._fused(layer)
        return self._separate(layer)

    def _layout(self, formats: Mapping[str, MatrixFormat]) -> RecordLayout:
        """Return the layout of experts whose projections have ``formats``."""
        return RecordLayout(self._config.hidden_size, self._config.expert_size, **formats)

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape of each projection of an expert."""
        wide = (self._config.expert_size, self._config.hidden_size)
        return {projection: wide[::-1] if projection == "down" else wide for projection in PROJECTIONS}

    def _stacked_experts(self, layer: int) -> tuple[LayerExperts, RecordLayout]:
        tensors: list[TensorInfo] = []
        formats: dict[str, MatrixFormat] = {}
        for projection, (rows, columns) in self._shapes().items():
            name, shape = self._stacked(layer, projection), (self._config.num_experts, rows, columns)
            mode = self._float_mode(name, columns)
            if mode is not None:
                tensors += self._floats(name, shape, mode)
                formats[projection] = MatrixFormat(*FLOAT_MODES[mode], "U8", mode)
                continue
            weight = self._published.get(f"{name}.weight")
            coded = weight is not None and self._tensors[weight].dtype == "U32"
            if f"{name}.scales" not in self._published and not coded:
                tensors.append(self._find(f"{name}.weight", shape))
                formats[projection] = MatrixFormat(None, None, tensors[-1].dtype)
                continue
            parts, bits, group_size = self._quantized(name, shape)
            tensors += parts
            formats[projection] = MatrixFormat(bits, group_size, parts[1].dtype)
        return StackedExperts.by_projection(tensors), self._layout(formats)

    def _fused(self, layer: int) -> tuple[LayerExperts, RecordLayout]:
        experts, size, hidden = self._config.num_experts, self._config.expert_size, self._config.hidden_size
        gate_up_name, down_name = (self._expert_name(template, layer) for template in self._names.fused)
        gate_up = self._find(gate_up_name, (experts, 2 * size, hidden))
        down = self._find(down_name, (experts, hidden, size))
        half = gate_up.nbytes // experts // 2
        parts = [(gate_up, 0, half), (gate_up, half, half), (down, 0, down.nbytes // experts)]
        dense = {"gate": gate_up, "up": gate_up, "down": down}
        return StackedExperts(parts), self._layout({name: _dense(tensor) for name, tensor in dense.items()})

    def _separate(self, layer: int) -> tuple[LayerExperts, RecordLayout]:
        experts = [self._separate_expert(layer, expert) for expert in range(self._config.num_experts)]
        tensors, formats = zip(*experts, strict=True)
        for own in formats:
            for projection in PROJECTIONS:
                if own[projection] != formats[0][projection]:
                    raise CheckpointError(
                        f"{self._where}: experts of layer {layer} have {projection} as {formats[0][projection].name} "
                        f"and as {own[projection].name}; all experts of a layer must have the same types",
                        code="mixed_precision",
                    )
        return SeparateExperts(tensors), self._layout(formats[0])

    def _separate_expert(self, layer: int, expert: int) -> tuple[list[TensorInfo], dict[str, MatrixFormat]]:
        """Return the tensors of an expert in the order of its record, and the formats of its projections."""
        tensors: list[TensorInfo] = []
        formats: dict[str, MatrixFormat] = {}
        for projection, shape in self._shapes().items():
            name = self._expert_name(self._names.separate, layer, projection, expert)
            if self._codes is not None and f"{name}.scales" in self._published:
                parts, bits, group_size = self._quantized(name, shape)
                tensors += parts
                formats[projection] = MatrixFormat(bits, group_size, parts[1].dtype)
                continue
            tensors.append(self._find(f"{name}.weight", shape))
            formats[projection] = _dense(tensors[-1])
        return tensors, formats


def _dense(tensor: TensorInfo) -> MatrixFormat:
    return MatrixFormat(None, None, tensor.dtype)
