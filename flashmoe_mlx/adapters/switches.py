"""Layers of routed experts of MLX-LM's models, with weights from a store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.adapters.library import mlx_lm
from flashmoe_mlx.adapters.records import slab_views
from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.record import Component
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.moe.groups import ExpertGroup, ExpertGroups
from flashmoe_mlx.stores.contract import ExpertStore

PARTS = ("weight", "scales", "biases", "bias", "global_scale")
"""The parameters of a linear layer of experts, each [experts, ...]."""


@dataclass(frozen=True, slots=True)
class Switch:
    """A layer of routed experts in a model.

    Attributes:
        path: its name in the model.
        module: a ``SwitchGLU`` or ``SwitchMLP`` of MLX-LM.
    """

    path: str
    module: Any

    def linears(self) -> dict[str, Any]:
        """Return its linear layers by name."""
        layers = mlx_lm("models.switch_layers")
        kinds = (layers.SwitchLinear, layers.QuantizedSwitchLinear)
        return {name: child for name, child in self.module.children().items() if isinstance(child, kinds)}

    def parameters(self) -> dict[str, mx.array]:
        """Return the parameters [experts, ...] of its linear layers, such as "up_proj.weight"."""
        return {
            f"{name}.{part}": linear[part]
            for name, linear in self.linears().items()
            for part in PARTS
            if isinstance(linear.get(part), mx.array)
        }


def find_switches(model: Any) -> list[Switch]:
    """Return all layers of routed experts of ``model``, in the order of their names."""
    layers = mlx_lm("models.switch_layers")
    found = [
        Switch(path, module)
        for path, module in model.named_modules()
        if isinstance(module, (layers.SwitchGLU, layers.SwitchMLP))
    ]
    return sorted(found, key=lambda switch: _order(switch.path))


def _order(path: str) -> list[tuple[int, str]]:
    """Return a key by which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


@dataclass(slots=True)
class Pass:
    """The store of the experts, and the context of the running forward pass, which all layers share."""

    store: ExpertStore
    context: ForwardContext | None = None


class _StreamedExperts(nn.Module):  # type: ignore[misc, name-defined]
    """A layer of routed experts whose weights are the slots of a store.

    The code of MLX-LM's layer computes with these slots, so a result has the same bits as with all experts in memory,
    provided that MLX computes each row by itself, as it does on CPUs.
    """

    def __init__(self, switch: Switch, layer: int, components: Sequence[Component], running: Pass) -> None:
        """Wrap ``switch``, whose weights are dropped.

        Args:
            switch: the layer.
            layer: its index among the layers of experts.
            components: the tensors of its records.
            running: the store, and the context of each pass.
        """
        super().__init__()
        self._inner = switch.module
        self._layer = layer
        self._components = components
        self._running = running
        self._linears = switch.linears()
        self._bound: mx.array | None = None
        for component in components:
            linear, _, part = component.name.rpartition(".")
            self._linears[linear][part] = None

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Return the outputs [..., K, out] of the experts ``indices`` [..., K] for ``x`` [..., in].

        Raises:
            ExpertStoreError: the store failed.
        """
        context, store = self._running.context, self._running.store
        assert context is not None
        context.reach(self._layer)
        k = indices.shape[-1]
        if x.shape[:-1] != indices.shape[:-1]:
            raise CheckpointError(
                f"experts of shape {list(indices.shape)} are chosen for inputs of shape {list(x.shape)}, which is not "
                "supported",
                code="unsupported_model",
            )
        chosen = context.clock.read("router", indices.reshape(-1, k).astype(mx.uint32))
        ordered = np.sort(chosen, axis=-1)
        if context.observer is not None:
            context.observer(self._layer, ordered)

        def after_last_fetch() -> None:
            if context.prefetcher is not None:
                context.prefetcher.chosen(self._layer, ordered, None)

        def before_group(done: float) -> None:
            context.reach(self._layer + done)

        groups = ExpertGroups(store, self._layer, chosen, context.clock, after_last_fetch, before_group)
        y = None
        for group in groups:
            if y is None and group.is_last:
                with context.clock.computing("experts"):
                    return self._apply(x, group.rows(self._bind(group)).reshape(indices.shape))
            with context.clock.computing("experts"):
                y = self._add(y, x.reshape(-1, x.shape[-1]), group)
            group.finish(y)
        assert y is not None
        return y.reshape(*indices.shape, -1)

    def _apply(self, x: mx.array, rows: npt.NDArray[np.int32]) -> mx.array:
        y: mx.array = self._inner(x, mx.array(rows.astype(np.uint32)))
        return y

    def _add(self, y: mx.array | None, x: mx.array, group: ExpertGroup) -> mx.array:
        """Write the outputs of the experts in ``group`` to ``y`` [T * K, out], which the first group makes."""
        rows = group.rows(self._bind(group))
        tokens, ranks = np.nonzero(rows >= 0)
        out = self._apply(x[mx.array(tokens)], rows[tokens, ranks][:, None])[:, 0]
        if y is None:
            y = mx.zeros((rows.size, out.shape[-1]), out.dtype)
        y[mx.array(tokens * rows.shape[1] + ranks)] = out
        return y

    def _bind(self, group: ExpertGroup) -> Sequence[int]:
        """Make the slots of ``group`` the weights of the linear layers; return the row of each of its experts."""
        slab = group.batch.slab
        if slab is not self._bound:
            for name, view in slab_views(slab, self._components).items():
                linear, _, part = name.rpartition(".")
                self._linears[linear][part] = view
            self._bound = slab
        return group.batch.slots


def attach(model: Any, switches: Sequence[Switch], layers: Sequence[Sequence[Component]], running: Pass) -> None:
    """Replace ``switches`` in ``model`` by layers with weights from the store of ``running``."""
    for index, (switch, components) in enumerate(zip(switches, layers, strict=True)):
        parent, name = _parent(model, switch.path)
        setattr(parent, name, _StreamedExperts(switch, index, components, running))


def _parent(model: Any, path: str) -> tuple[Any, str]:
    """Return the module that holds the module ``path``, and the name under which it does."""
    *outer, name = path.split(".")
    for part in outer:
        model = model[int(part)] if isinstance(model, list) else getattr(model, part)
    return model, name


def component_types(switches: Sequence[Switch]) -> Iterator[list[tuple[str, tuple[int, ...], mx.Dtype]]]:
    """Yield for each of ``switches`` the name, the shape for one expert, and the type of every parameter."""
    for switch in switches:
        yield [(name, array.shape[1:], array.dtype) for name, array in switch.parameters().items()]
