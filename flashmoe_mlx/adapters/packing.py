"""Records and resident weights of a model of MLX-LM, for a pack."""

from collections.abc import Mapping
from pathlib import Path
from threading import Lock

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from flashmoe_mlx.adapters.config import AdaptedConfig
from flashmoe_mlx.adapters.loading import AdaptedExperts, Locate, layout_of, load_lazily
from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.arrays import bytes_of
from flashmoe_mlx.formats.extents import read_extents
from flashmoe_mlx.formats.record import LayerLayouts
from flashmoe_mlx.formats.safetensors_header import TensorInfo


class AdaptedRecords:
    """The routed experts of a checkpoint that MLX-LM's model rearranges or computes.

    Computed experts of one layer are in memory at a time.
    """

    def __init__(self, folder: Path, config: AdaptedConfig, tensors: Mapping[str, TensorInfo], locate: Locate) -> None:
        """Find the experts.

        Args:
            folder: the checkpoint.
            config: its sizes.
            tensors: the tensors in its files.
            locate: returns the place of bytes of a tensor.

        Raises:
            CheckpointError: MLX-LM refuses the checkpoint (code "mlx_lm_refused"), or its layers have different numbers
                of experts ("unsupported_model").
        """
        loaded = load_lazily(folder)
        numbers = {int(linear.num_experts) for switch in loaded.switches for linear in switch.linears().values()}
        if numbers != {config.num_experts}:
            raise CheckpointError(
                f"{folder}: its layers have different numbers of experts ({sorted(numbers)}), which a pack cannot hold",
                code="unsupported_model",
            )
        self.layout: LayerLayouts = layout_of(loaded.switches)
        self.num_layers: int = config.num_layers
        self.num_experts: int = config.num_experts
        self._folder = folder
        self._places: AdaptedExperts | None = None
        try:
            self._places = AdaptedExperts(loaded, config, tensors, locate)
        except CheckpointError as error:
            if error.code != "needs_pack":
                raise
        self._lock = Lock()
        self._computed: tuple[int, list[memoryview]] = (-1, [])

    def payload(self, layer: int, expert: int) -> bytearray:
        """Return the components of an expert in the order of its record."""
        if self._places is not None:
            return read_extents(self._places.extents(layer, expert))
        data = bytearray()
        for component, own in zip(self.layout[layer].components, self._components(layer), strict=True):
            data += own[expert * component.nbytes : (expert + 1) * component.nbytes]
        return data

    def exact(self, layer: int, expert: int) -> Mapping[str, npt.NDArray[np.float32]]:  # noqa: ARG002  # see RecordSource
        """Return an empty mapping: records have the values with which MLX-LM computes."""
        return {}

    def _components(self, layer: int) -> list[memoryview]:
        """Return the bytes of each component of all experts of ``layer``, computed by MLX-LM."""
        with self._lock:
            if self._computed[0] != layer:
                self._computed = (-1, [])
                # Loaded again, so that no layer stays in memory with the arrays of the model.
                arrays = load_lazily(self._folder).switches[layer].parameters()
                made = [bytes_of(arrays[component.name]) for component in self.layout[layer].components]
                self._computed = (layer, made)
            return self._computed[1]


def resident_parameters(folder: Path) -> dict[str, mx.array]:
    """Return all parameters of the model in ``folder`` but those of routed experts, lazily, by their names."""
    loaded = load_lazily(folder)
    experts = {f"{switch.path}.{name}" for switch in loaded.switches for name in switch.parameters()}
    flat = dict(tree_flatten(loaded.module.parameters()))
    return {name: array for name, array in flat.items() if name not in experts}
