"""Routed experts of a few tokens where a store holds all experts of a layer: the router's choice stays on the GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels import ExpertFormat
from flashmoe_mlx.moe.router import Router
from flashmoe_mlx.moe.shared_expert import SharedExpert
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.stores.delivery import LayerInMemory

_ZEROS = 4


@dataclass(frozen=True, slots=True)
class ExpertsInMemory:
    """Routes tokens and applies their experts lazily, without waiting for the router's choice.

    Attributes:
        kernel: as ``routed_experts.reference.routed_experts``.
        chosen: as ``chosen_experts.reference.chosen_experts``; None where a shared expert is not fused.
        form: the format of the records.
        fuse_shared: whether ``kernel`` takes the shared expert along.
        most_tokens: the largest number of tokens for which ``kernel`` is the best choice.
    """

    kernel: Callable[..., mx.array]
    chosen: Callable[..., tuple[mx.array, mx.array]] | None
    form: ExpertFormat
    fuse_shared: bool
    most_tokens: int

    def __call__(
        self, residual: mx.array, router: Router, shared: SharedExpert | None, whole: LayerInMemory, earlier: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Add routed and shared experts to ``residual`` [T, hidden].

        Args:
            residual: the residual stream.
            router: chooses the experts.
            shared: the expert that every token uses, or None.
            whole: all experts of the layer.
            earlier: the experts of earlier layers, int32 [n].

        Returns:
            [T, hidden] in the dtype of ``residual``, and ``earlier`` followed by the chosen experts, int32 [n + T * K];
            both lazy.
        """
        x, scores = router.normalize_and_score(residual)
        fused = shared.weights if shared is not None and self.fuse_shared else None
        apart = None if self.fuse_shared else shared
        if self.chosen is not None and scores is not None:
            choice = (scores, whole.table, earlier, router.experts_k)
            return self.chosen(x, residual, whole.slab, *choice, self.form, fused, router.renormalized)
        chosen, rows, all_weights = router.choose_rows(x, scores, whole.table)
        listed = mx.concatenate([earlier, chosen.reshape(-1).astype(mx.int32)])
        if apart is None:
            return self.kernel(x, whole.slab, rows, all_weights, self.form, fused, residual), listed
        weights, shared_weight = mx.split(all_weights, [router.experts_k], axis=-1)
        y = self.kernel(x, whole.slab, rows, weights, self.form, None, residual)
        return y + apart(x, shared_weight.astype(x.dtype)), listed


@cache
def _nothing() -> mx.array:
    zeros = mx.zeros(_ZEROS, mx.int32)  # kernels take no empty arrays
    mx.eval(zeros)
    return zeros


@dataclass(slots=True)
class UsedExperts:
    """Experts that layers of one pass used and that ``store`` has not counted yet: their indices are on the GPU."""

    store: ExpertStore
    _layers: list[int] = field(default_factory=list)
    listed: mx.array = field(default_factory=_nothing)
    """The experts of all layers one after the other, int32 [layers * T * K], lazy; before them, some zeros."""

    def add(self, layer: int, listed: mx.array) -> None:
        """Remember ``listed``, to which ``layer`` has appended its experts."""
        self._layers.append(layer)
        self.listed = listed

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._layers)

    def count(
        self,
        indices: npt.NDArray[np.integer],
        chosen: Callable[[int, npt.NDArray[np.integer]], object] | None = None,
        rows: Sequence[int] | None = None,
        of: int = 0,
    ) -> None:
        """Count the uses in the store.

        Args:
            indices: the values of ``listed``.
            chosen: receives each layer with the experts of all tokens that count, one token after the other.
            rows: the tokens that count, in this order; None if all do.
            of: T, with ``rows``.
        """
        if not self._layers:
            return
        experts = indices[_ZEROS:].reshape(len(self._layers), -1)
        if rows is not None:
            experts = experts.reshape(len(self._layers), of, -1)[:, list(rows)].reshape(len(self._layers), -1)
        self.store.note_use(self._layers, experts)
        if chosen is not None:
            for layer, row in zip(self._layers, experts, strict=True):
                chosen(layer, row)
