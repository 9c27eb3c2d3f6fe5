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
from flashmoe_mlx.layers.shared_row import Pair, SharedRow
from flashmoe_mlx.models.decoder import DecoderLayer, Model
from flashmoe_mlx.models.runnable import RunnableModel
from flashmoe_mlx.moe.experts import MixtureOfExperts
from flashmoe_mlx.moe.in_memory import UsedExperts
from flashmoe_mlx.stores.delivery import LayerInMemory

_SHAPES = 16
"""Traced functions that are kept: one for each capacity of a KV cache and each number of sequences."""


class TracedSteps:
    """A model, to be called with one token of one sequence, or one token of each of several."""

    def __init__(self, model: Model, layers: list[LayerInMemory | None]) -> None:
        """Prepare steps of ``model`` with the experts of ``layers``, None for a layer without experts.

        Functions are traced at their first call.
        """
        self._model = model
        self._layers = layers
        self.most_sequences: int = self._most_sequences()
        """The largest number of sequences of a step."""
        self._traced = lru_cache(maxsize=_SHAPES)(self._trace)

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

    def _most_sequences(self) -> int:
        mixers = [layer.mixer for layer in self._model.layers]
        if not all(mixer.takes_positions(2) for mixer in mixers if isinstance(mixer, Attention)):
            return 1
        return min(mixture.in_memory.most_tokens for mixture in self._model.mixtures if mixture.in_memory is not None)

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
        logits, finite, listed, *states = self._traced(1, capacity)(token, position, used.listed, *states)
        for layer in cache.layers:
            if isinstance(layer, RecurrentState):
                layer.conv_state, layer.recurrent_state, *states = states
            else:
                assert isinstance(layer, KVCache)
                layer.length += 1
        for experts in self._model.mixtures:
            used.add(experts.layer, listed)
        cache.length += 1
        return logits[0], finite

    def logits_together(
        self, tokens: mx.array, positions: mx.array, row: SharedRow, used: UsedExperts
    ) -> tuple[mx.array, mx.array, dict[int, Pair]]:
        """Compute the logits f32 [R, vocabulary] of ``tokens``, and whether those of each row are finite, int32 [R].

        Args:
            tokens: uint32 [R], a token of every row of shared arrays.
            positions: their positions, int32 [max(4, R)].
            row: a row of the arrays. Its keys and values have room for a token and are updated in place.
            used: takes the experts of all rows.

        Returns:
            Logits, whether they are finite, and the new states of the layers that keep no tokens; all lazy.
        """
        states: list[mx.array] = []
        capacity = 0
        for index in range(len(self._model.layers)):
            states += row.tokens.get(index) or row.states[index]
            capacity = states[-1].shape[2] if index in row.tokens else capacity
        traced = self._traced(len(tokens), capacity)
        logits, finite, listed, *states = traced(tokens, positions, used.listed, *states)
        for experts in self._model.mixtures:
            used.add(experts.layer, listed)
        pairs = zip(states[::2], states[1::2], strict=True)
        return logits, finite, dict(zip(row.states, pairs, strict=True))

    def _trace(self, rows: int, capacity: int) -> Callable[..., Any]:  # noqa: ARG002  # the key of the cache
        return mx.compile(self._step)

    def _step(self, token: mx.array, position: mx.array, listed: mx.array, *states: mx.array) -> tuple[mx.array, ...]:
        """Compute logits of every row, whether they are finite, the list of experts, and new recurrent states."""
        model = self._model
        x = model.embedding.rows(token, model.norm.dtype)
        new: list[mx.array] = []
        for index, (layer, whole) in enumerate(zip(model.layers, self._layers, strict=True)):
            x, listed, changed = layer_step(layer, whole, x, position, listed, states[2 * index : 2 * index + 2])
            new += changed
        logits = model.logits(x)
        finite = mx.isfinite(logits).all(axis=-1).astype(mx.int32)
        return logits, finite, listed, *new


def layer_step(
    layer: DecoderLayer,
    whole: LayerInMemory | None,
    x: mx.array,
    position: mx.array,
    listed: mx.array,
    states: tuple[mx.array, ...],
) -> tuple[mx.array, mx.array, tuple[mx.array, ...]]:
    """Compute a layer for one token, or one token of each of several sequences.

    Args:
        layer: the layer.
        whole: its experts; None for a layer without.
        x: the residual [sequences, hidden].
        position: the position of the token of each sequence, int32 [max(4, sequences)].
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
