"""Decode steps of a model whose experts are all in the memory of a GPU, by functions that MLX traces once.

To build the graph of a layer in Python takes longer than to compute it. A traced function builds it in microseconds.
Whatever changes with the position, attention to the cache, stays outside.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from flashmoe_mlx.layers.attention import Attention
from flashmoe_mlx.layers.cache import KVCache, LayerCache, RecurrentState, SequenceCache
from flashmoe_mlx.layers.gated_delta_net import GatedDeltaNet
from flashmoe_mlx.models.decoder import DecoderLayer, Model
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.stores.contract import LayerInMemory

LayerStep = Callable[[mx.array, LayerCache], tuple[mx.array, mx.array]]
"""Takes the residual [1, hidden] and the cache of a layer; returns the next residual and the experts chosen [1, K]."""


class TracedSteps:
    """The layers of a model, to be called with one token of one sequence."""

    def __init__(self, model: Model, layers: list[LayerInMemory]) -> None:
        """Prepare steps of ``model`` with the experts of ``layers``; functions are traced at their first call."""
        self._model = model
        self._steps = [layer_step(layer, whole) for layer, whole in zip(model.layers, layers, strict=True)]

    @classmethod
    def of(cls, model: Model) -> "TracedSteps | None":
        """Return the steps of ``model``, or None unless its store holds all layers in memory that a GPU reads."""
        layers = []
        for layer in model.layers:
            whole = layer.experts.whole_layer(1)
            if whole is None:
                return None
            layers.append(whole)
        return cls(model, layers)

    def hidden(self, token: mx.array, cache: SequenceCache, context: ForwardContext) -> mx.array:
        """Compute the hidden states [1, hidden] of ``token`` uint32 [1] lazily; see ``Model.forward``.

        ``context.used`` takes the experts. A call that fails leaves ``cache`` between two states.
        """
        assert context.used is not None
        x = self._model.embedding.rows(token, self._model.norm.dtype)
        for index, step in enumerate(self._steps):
            if context.before_layer is not None:
                context.before_layer(index)
            x, chosen = step(x, cache.layers[index])
            context.used.add(index, chosen)
        cache.length += 1
        return x


def layer_step(layer: DecoderLayer, whole: LayerInMemory) -> LayerStep:
    """Return what computes ``layer``, whose experts are ``whole``."""
    mixer = layer.mixer
    if isinstance(mixer, GatedDeltaNet):
        return _recurrent_step(layer, mixer, whole)
    assert isinstance(mixer, Attention)
    return _attention_step(layer, mixer, whole)


def _recurrent_step(layer: DecoderLayer, mixer: GatedDeltaNet, whole: LayerInMemory) -> LayerStep:
    def everything(x: mx.array, conv_state: mx.array, recurrent_state: mx.array) -> tuple[mx.array, ...]:
        y, conv_state, recurrent_state = mixer.recur(mixer.project(layer.normalize(x)), conv_state, recurrent_state)
        x, chosen = layer.experts.apply(mixer.out_proj(y, x), whole)
        return x, chosen, conv_state, recurrent_state

    traced: Callable[..., Any] = mx.compile(everything)

    def step(x: mx.array, cache: LayerCache) -> tuple[mx.array, mx.array]:
        assert isinstance(cache, RecurrentState)
        x, chosen, cache.conv_state, cache.recurrent_state = traced(x, cache.conv_state, cache.recurrent_state)
        return x, chosen

    return step


def _attention_step(layer: DecoderLayer, mixer: Attention, whole: LayerInMemory) -> LayerStep:
    def before(x: mx.array) -> tuple[mx.array, ...]:
        return mixer.project(layer.normalize(x))

    def after(y: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
        return layer.experts.apply(mixer.o_proj(y, x), whole)

    traced_before: Callable[..., Any] = mx.compile(before)
    traced_after: Callable[..., Any] = mx.compile(after)

    def step(x: mx.array, cache: LayerCache) -> tuple[mx.array, mx.array]:
        assert isinstance(cache, KVCache)
        following, chosen = traced_after(mixer.attend(cache, *traced_before(x)), x)
        return following, chosen

    return step
