"""Routed experts of a few tokens where a store holds all experts of a layer: the router's choice stays on the GPU."""

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels import ExpertFormat
from flashmoe_mlx.moe.router import Router
from flashmoe_mlx.moe.shared_expert import SharedExpert
from flashmoe_mlx.stores.contract import ExpertStore, LayerInMemory


@dataclass(frozen=True, slots=True)
class ExpertsInMemory:
    """Routes tokens and applies their experts lazily, without waiting for the router's choice.

    Attributes:
        kernel: as ``routed_experts.reference.routed_experts``.
        form: the format of the records.
        fuse_shared: whether ``kernel`` takes the shared expert along.
        most_tokens: the largest number of tokens for which ``kernel`` is the best choice.
    """

    kernel: Callable[..., mx.array]
    form: ExpertFormat
    fuse_shared: bool
    most_tokens: int

    def __call__(
        self, residual: mx.array, router: Router, shared: SharedExpert, whole: LayerInMemory
    ) -> tuple[mx.array, mx.array]:
        """Add routed and shared experts to ``residual`` [T, hidden].

        Args:
            residual: the residual stream.
            router: chooses the experts.
            shared: the expert that every token uses.
            whole: all experts of the layer.

        Returns:
            [T, hidden] in the dtype of ``residual``, and the chosen experts, uint32 [T, K]; both lazy.
        """
        x = router.normalize(residual)
        chosen, rows, all_weights = router.choose_rows(x, whole.table)
        if self.fuse_shared:
            y = self.kernel(x, whole.slab, rows, all_weights, self.form, shared.weights)
        else:
            weights, shared_weight = mx.split(all_weights, [router.experts_k], axis=-1)
            routed = self.kernel(x, whole.slab, rows, weights, self.form, None)
            y = routed + shared(x, shared_weight.astype(x.dtype))
        return residual + y, chosen


@dataclass(slots=True)
class UsedExperts:
    """Experts that layers of one pass used and that ``store`` has not counted yet: their indices are on the GPU."""

    store: ExpertStore
    _layers: list[int] = field(default_factory=list)
    _chosen: list[mx.array] = field(default_factory=list)

    def add(self, layer: int, chosen: mx.array) -> None:
        """Remember the experts ``chosen`` [T, K] of ``layer``."""
        self._layers.append(layer)
        self._chosen.append(chosen)

    def indices(self) -> mx.array:
        """Return all indices in one array, int32 [layers * T * K], lazily."""
        return mx.concatenate([chosen.reshape(-1) for chosen in self._chosen]).astype(mx.int32)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._layers)

    def count(self, indices: npt.NDArray[np.integer]) -> None:
        """Count the uses in the store; ``indices`` are the values of ``indices()``."""
        if self._layers:
            self.store.note_use(self._layers, indices.reshape(len(self._layers), -1))
