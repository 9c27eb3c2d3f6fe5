"""Decode steps of a model whose experts are all in the memory of a GPU, by a function that MLX traces once.

To build the graph of a step in Python takes longer than to compute it; a traced function builds it in microseconds. It
serves every position: the position is an array, and the caches have their capacity, which rarely changes.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from flashmoe_mlx.layers.attention import Attention
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.layers.gated_delta_net import GatedDeltaNet
from flashmoe_mlx.layers.kv_cache import KVCache
from flashmoe_mlx.layers.mlp import Mlp
from flashmoe_mlx.layers.recurrent_state import RecurrentState
from flashmoe_mlx.models.decoder import DecoderLayer, Model
from flashmoe_mlx.models.runnable import RunnableModel
from flashmoe_mlx.moe.experts import MixtureOfExperts
from flashmoe_mlx.moe.in_memory import UsedExperts
from flashmoe_mlx.stores.delivery import LayerInMemory

_CAPACITIES = 8
"""Traced functions that are kept: one for each capacity of a KV cache."""


class TracedSteps:
    """A model, to be called with one token of one sequence."""

    def __init__(self, model: Model, layers: list[LayerInMemory | None]) -> None:
        """Prepare steps of ``model`` with the experts of ``layers``, None for a layer without experts.

        Functions are traced at their first call.
        """
        self._model = model
        self._layers = layers
        self._traced = lru_cache(maxsize=_CAPACITIES)(self._trace)

    @classmethod
    def of(cls, model: RunnableModel) -> "TracedSteps | None":
        """Return the steps of ``model``, or None unless its store holds all layers in memory that a GPU reads.

        Also None if a GPU has no kernel for a mixer, or if the model is not a ``Model`` with ``DecoderLayer``.
        """
        if type(model) is not Model:
            return None
        layers: list[LayerInMemory | None] = []
        for layer in model.layers:
            experts = layer.feed_forward
            whole = experts.whole_layer(1) if isinstance(experts, MixtureOfExperts) else None
            missing = whole is None and isinstance(experts, MixtureOfExperts)
            if missing or (isinstance(layer.mixer, Attention) and not layer.mixer.takes_positions()):
                return None
            layers.append(whole)
        return cls(model, layers)

    def logits(self, token: mx.array, cache: SequenceCache, used: UsedExperts) -> tuple[mx.array, mx.array]:
        """Compute the logits f32 [vocabulary] of ``token`` uint32 [1] lazily, and whether all are finite, int32 [1].

        ``used`` takes the experts. A call that fails leaves ``cache`` between two states.
        """
        states: list[mx.array] = []
        capacity = 0
        for layer, mixer in zip(cache.layers, (layer.mixer for layer in self._model.layers), strict=True):
            if isinstance(layer, KVCache):
                assert isinstance(mixer, Attention)
                states += mixer.room(layer, 1, self._model.norm.dtype)
                capacity = states[-1].shape[2]
            else:
                states += layer.arrays()
        position = mx.full((4,), cache.length, mx.int32)
        logits, finite, listed, *states = self._traced(capacity)(token, position, used.listed, *states)
        for layer in cache.layers:
            if isinstance(layer, RecurrentState):
                layer.conv_state, layer.recurrent_state, *states = states
            else:
                assert isinstance(layer, KVCache)
                layer.length += 1
        for experts in self._model.mixtures:
            used.add(experts.layer, listed)
        cache.length += 1
        return logits, finite

    def _trace(self, capacity: int) -> Callable[..., Any]:  # noqa: ARG002  # the key of the cache
        return mx.compile(self._step)

    def _step(self, token: mx.array, position: mx.array, listed: mx.array, *states: mx.array) -> tuple[mx.array, ...]:
        """Compute logits, whether they are finite, the list of experts, and new recurrent states."""
        model = self._model
        x = model.embedding.rows(token, model.norm.dtype)
        new: list[mx.array] = []
        for index, (layer, whole) in enumerate(zip(model.layers, self._layers, strict=True)):
            x, listed, changed = layer_step(layer, whole, x, position, listed, states[2 * index : 2 * index + 2])
            new += changed
        logits = model.logits(x)[0]
        finite = mx.isfinite(logits).all(keepdims=True).astype(mx.int32)
        return logits, finite, listed, *new


def layer_step(
    layer: DecoderLayer,
    whole: LayerInMemory | None,
    x: mx.array,
    position: mx.array,
    listed: mx.array,
    states: tuple[mx.array, ...],
) -> tuple[mx.array, mx.array, tuple[mx.array, ...]]:
    """Compute a layer for one token.

    Args:
        layer: the layer.
        whole: its experts; None for a layer without.
        x: the residual [1, hidden].
        position: the position of the token, int32 [4].
        listed: the experts of earlier layers; see ``ExpertsInMemory``.
        states: both arrays of the layer's cache. Keys and values have room for the token and are updated in place.

    Returns:
        The next residual, the longer list, and the new states of a recurrence.
    """
    projected, mixer = layer.project(x), layer.mixer
    changed: tuple[mx.array, ...] = ()
    if isinstance(mixer, GatedDeltaNet):
        y, *after = mixer.recur(projected, states[0], states[1])
        x, changed = mixer.out_proj(y, x), tuple(after)
    else:
        assert isinstance(mixer, Attention)
        x = mixer.o_proj(mixer.attend_at(position, states, projected), x)
    if isinstance(layer.feed_forward, Mlp):
        x = layer.feed_forward(x)
    else:
        assert whole is not None
        x, listed = layer.feed_forward.apply(x, whole, listed)
    return x, listed, changed
