"""Load a model through MLX-LM without reading its experts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from flashmoe_mlx.adapters import lineage
from flashmoe_mlx.adapters.config import AdaptedConfig, chosen_field
from flashmoe_mlx.adapters.library import first_line, mlx_lm, model_classes
from flashmoe_mlx.adapters.model import AdaptedModel, arrays_of
from flashmoe_mlx.adapters.records import AnyFormat, NamedLayout, components_of
from flashmoe_mlx.adapters.switches import Pass, Switch, attach, component_types, find_switches
from flashmoe_mlx.custom_kernels import Kernels
from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.arrays import MLX_DTYPES
from flashmoe_mlx.formats.extents import Extent
from flashmoe_mlx.formats.record import LayerLayouts
from flashmoe_mlx.formats.safetensors_header import TensorInfo
from flashmoe_mlx.progress import report
from flashmoe_mlx.stores.contract import ExpertStore

_REMEDY = "make a pack of the checkpoint, which holds what mlx-lm computes: task=pack source=<checkpoint> out=<folder>"
Locate = Callable[[TensorInfo, int, int], Extent]
"""Returns the place of bytes of a tensor: (tensor, first byte, number of bytes)."""


@dataclass(frozen=True)
class Loaded:
    """A model of MLX-LM whose parameters are not read yet.

    Attributes:
        module: the model.
        switches: its layers of routed experts.
        args: the arguments of its class.
        before: the tensors in the files, as MLX loads them.
        after: the tensors after the model's ``sanitize``.
        sanitize: the method.
    """

    module: Any
    switches: Sequence[Switch]
    args: Any
    before: Mapping[str, mx.array]
    after: Mapping[str, mx.array]
    sanitize: Callable[[dict[str, mx.array]], Mapping[str, mx.array]]


@dataclass(frozen=True)
class PackedTensors:
    """The tensors of a pack of a model of MLX-LM, under the names of the model's parameters.

    Attributes:
        resident: the file of the resident weights.
        layout: the layout of the records.
        num_experts: the number of experts in a layer.
    """

    resident: Path
    layout: LayerLayouts
    num_experts: int

    def tensors(self, switches: Sequence[Switch]) -> dict[str, mx.array]:
        """Return all tensors, lazily; those of experts are zeros, in their shapes and types."""
        loaded = mx.load(str(self.resident))
        assert isinstance(loaded, dict)
        found: dict[str, mx.array] = dict(loaded)
        for switch, own in zip(switches, self.layout, strict=True):
            for component in own.components:
                shape = (self.num_experts, *component.shape)
                found[f"{switch.path}.{component.name}"] = mx.zeros(shape, MLX_DTYPES[component.dtype])
        return found


def load_lazily(folder: Path, change: Mapping[str, Any] | None = None, packed: PackedTensors | None = None) -> Loaded:
    """Load the model in ``folder`` through MLX-LM; no tensor is read.

    Args:
        folder: a checkpoint, whose headers are valid, or a pack.
        change: values that replace those of ``config.json``.
        packed: the tensors of the pack; None for a checkpoint.

    Raises:
        CheckpointError: MLX-LM refuses the checkpoint; code "mlx_lm_refused".
    """
    seen: dict[str, Any] = {}

    def classes(config: dict[str, Any]) -> tuple[type, type]:
        own, args_class = model_classes(config)

        class Observed(own):  # type: ignore[misc, valid-type]
            """The model's class; remembers the tensors of the files."""

            def __init__(self, args: Any) -> None:
                super().__init__(args)
                seen["args"] = args

            def sanitize(self, weights: dict[str, mx.array]) -> Mapping[str, mx.array]:
                if packed is not None:
                    weights = packed.tensors(find_switches(self))
                    seen.update(before={}, after={}, sanitize=dict)
                    return weights
                seen["before"] = dict(weights)
                seen["sanitize"] = super().sanitize if hasattr(own, "sanitize") else lambda tensors: tensors
                seen["after"] = dict(seen["sanitize"](weights))
                return dict(seen["after"])

        return Observed, args_class

    try:
        load = partial(mlx_lm("utils").load_model, folder, lazy=True, model_config=change, get_model_classes=classes)
        module, _ = load(strict=packed is None)  # a pack has no files of the names that MLX-LM looks for
        if packed is not None:
            module.load_weights(list(packed.tensors(find_switches(module)).items()), strict=True)
    except CheckpointError:
        raise
    except Exception as error:  # the code of another package meets untrusted input
        raise CheckpointError(
            f"{folder}: mlx-lm cannot load this checkpoint ({first_line(error)})", code="mlx_lm_refused"
        ) from None
    return Loaded(module, find_switches(module), **seen)


def layout_of(switches: Sequence[Switch]) -> LayerLayouts:
    """Return the layout of the records of ``switches``."""
    first = next(iter(switches[0].linears().values()))
    scales = first.get("scales")
    typed = first.weight if scales is None or scales.dtype == mx.uint8 else scales
    names = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32"}
    bits, group_size = getattr(first, "bits", None), getattr(first, "group_size", None)
    form = AnyFormat(bits, group_size, names[typed.dtype])
    sizes = int(first.input_dims), int(first.output_dims)
    layers = (components_of(tensors) for tensors in component_types(switches))
    return LayerLayouts.of(NamedLayout(*sizes, form, form, form, tensors) for tensors in layers)


class AdaptedExperts:
    """The routed experts of a checkpoint that MLX-LM's model rearranges, as a source of records."""

    def __init__(
        self, loaded: Loaded, config: AdaptedConfig, tensors: Mapping[str, TensorInfo], locate: Locate
    ) -> None:
        """Find the experts in the files.

        Args:
            loaded: the model.
            config: its sizes.
            tensors: the tensors in the files.
            locate: returns the place of bytes of a tensor.

        Raises:
            CheckpointError: the model computes its experts, or their parts lie apart (code "needs_pack").
        """
        self.layout: LayerLayouts = layout_of(loaded.switches)
        self.num_layers: int = config.num_layers
        self.num_experts: int = config.num_experts
        self._locate = locate
        self._nodes = _origins(loaded, self.layout, tensors)

    def extents(self, layer: int, expert: int) -> list[Extent]:
        """Locate the components of an expert, in the order of its record."""
        rows = (lineage.row(node, expert) for node in self._nodes[layer])
        return [self._locate(*piece) for piece in lineage.joined([p for row in rows for p in lineage.pieces_of(row)])]


def _origins(loaded: Loaded, layout: LayerLayouts, tensors: Mapping[str, TensorInfo]) -> list[list[lineage.Node]]:
    """Return the origin of each component of each layer, in the order of the layout."""
    wanted = [
        f"{switch.path}.{component.name}"
        for switch, own in zip(loaded.switches, layout, strict=True)
        for component in own.components
    ]
    unread = [name for name in wanted if name not in loaded.after]
    if unread:
        raise CheckpointError(f"mlx-lm computes {unread[0]} from the files; {_REMEDY}", code="needs_pack")
    origin = {id(array): name for name, array in loaded.before.items()}
    found: dict[str, lineage.Node | str] = {
        name: lineage.Region.whole(tensors[origin[id(loaded.after[name])]])
        for name in wanted
        if id(loaded.after[name]) in origin
    }
    traced = [name for name in wanted if name not in found]
    if traced:
        typed = {name: (tensors[name], array.dtype) for name, array in loaded.before.items()}
        found |= lineage.trace(loaded.sanitize, typed, traced)
    names = iter(wanted)
    return [
        [_checked(name, found[name], component.shape) for component, name in zip(own.components, names, strict=False)]
        for own in layout
    ]


def _checked(name: str, node: lineage.Node | str, shape: tuple[int, ...]) -> lineage.Node:
    """Return ``node``, whose rows have ``shape`` and can be read.

    Raises:
        CheckpointError: they cannot; code "needs_pack".
    """
    try:
        if isinstance(node, str):
            raise lineage.UntraceableError(node)
        if node.shape[1:] != shape:
            raise lineage.UntraceableError(f"it has rows of shape {list(node.shape[1:])}, expected {list(shape)}")
        lineage.pieces_of(lineage.row(node, 0))
    except lineage.UntraceableError as error:
        raise CheckpointError(
            f"experts cannot be read from the checkpoint: {name}: {error}; {_REMEDY}",
            code="needs_pack",
        ) from None
    return node


def build_adapted(
    folder: Path,
    config: AdaptedConfig,
    layout: LayerLayouts,
    packed: PackedTensors | None,
    store: ExpertStore,
    experts_k: int,
    kernels: Kernels,  # noqa: ARG001  # MLX computes
    dtype: mx.Dtype,  # noqa: ARG001  # the checkpoint's type is that of activations
) -> AdaptedModel:
    """Load the model in ``folder`` with its resident weights in memory, and its experts in ``store``.

    Args:
        folder: the checkpoint or the pack.
        config: its sizes.
        layout: the layout of the records of ``store``.
        packed: the tensors of the pack in ``folder``; None for a checkpoint.
        store: serves its routed experts.
        experts_k: routed experts of a token in each layer.
        kernels: not used.
        dtype: not used.

    Raises:
        CheckpointError: MLX-LM refuses the checkpoint; code "mlx_lm_refused".
    """
    report("reading the weights that all tokens use")
    loaded = load_lazily(folder, packed=packed)
    place, own = chosen_field(loaded.args)
    if experts_k != own:
        loaded = load_lazily(folder, _changed(folder, place, experts_k), packed)
    running = Pass(store)
    attach(loaded.module, loaded.switches, [own.components for own in layout], running)
    arrays = arrays_of(loaded.module)
    for array in arrays:
        mx.eval(array)
    nbytes = sum(array.nbytes for array in arrays)
    return AdaptedModel(loaded.module, config, experts_k, running, loaded.switches, nbytes)


def _changed(folder: Path, place: Sequence[str], experts_k: int) -> dict[str, Any]:
    """Return the part of ``config.json`` that sets the number of chosen experts at ``place`` to ``experts_k``."""
    published: dict[str, Any] = mlx_lm("utils").load_config(folder)
    outer, *inner = place
    if not inner:
        return {outer: experts_k}
    return {outer: {**published.get(outer, {}), inner[-1]: experts_k}}
