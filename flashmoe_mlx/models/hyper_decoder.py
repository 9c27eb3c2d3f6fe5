"""A model with hyper-connections: several residual streams between its layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flashmoe_mlx.layers.cache import LayerCache, SequenceCache
from flashmoe_mlx.layers.hyper_connections import HyperConnection
from flashmoe_mlx.layers.linear import Linear
from flashmoe_mlx.layers.ngrams import Ids, NgramLayer
from flashmoe_mlx.layers.recurrent_state import RecurrentState
from flashmoe_mlx.layers.sequences import BLOCK, Block, blocks
from flashmoe_mlx.models.decoder import Layer, Model
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.moe.experts import MixtureOfExperts
from flashmoe_mlx.moe.router import Router


@dataclass(frozen=True, slots=True)
class HyperLayer(Layer):
    """A layer between residual streams.

    Attributes:
        ngrams: adds embeddings of n-grams to the streams before the layer, or None.
        around_mixer: connects the mixer to the streams.
        around_experts: connects the mixture of experts to the streams.
    """

    ngrams: NgramLayer | None
    around_mixer: HyperConnection
    around_experts: HyperConnection

    def __call__(
        self,
        x: mx.array,
        tokens: Ids,
        caches: Sequence[LayerCache],
        states: Sequence[RecurrentState],
        lengths: Sequence[int],
        context: ForwardContext,
    ) -> mx.array:
        """Compute the streams [T, streams * hidden] from those of the layer before; the last operations stay lazy.

        Args:
            x: the streams of the new tokens of all sequences, one sequence after the other.
            tokens: the new tokens, [T].
            caches: the cache of each sequence in this layer.
            states: the state of ``ngrams`` for each sequence; none without it.
            lengths: the number of new tokens of each sequence.
            context: shared by all layers of a pass.
        """
        clock = context.clock
        feed_forward = self.feed_forward
        assert isinstance(feed_forward, MixtureOfExperts)
        if context.prefetcher is not None:
            context.prefetcher.begins(feed_forward.layer, x)
        done = []
        with clock.computing("attention"):
            for block in _blocks(lengths):
                context.reach(self.index + block.rows.start / len(x) / 2)
                own = states[block.sequences]
                rows = self._mix(x[block.rows], tokens[block.rows], caches[block.sequences], own, block.lengths)
                done.append(rows)
                if len(x) > BLOCK:
                    kept = [*caches[block.sequences], *own]
                    mx.eval(rows, [array for cache in kept for array in cache.arrays()])
            x = _joined(done)
        clock.settle("attention", x)
        with clock.computing("experts"):
            read = [self.around_experts.read(x[block.rows]) for block in _blocks(lengths)]
        y = feed_forward(_joined([mixed for mixed, _ in read]), context)
        with clock.computing("experts"):
            written = [
                self.around_experts.write(x[block.rows], y[block.rows], normed)
                for block, (_, normed) in zip(_blocks(lengths), read, strict=True)
            ]
            x = _joined(written)
        clock.settle("experts", x)
        return x

    def _mix(
        self,
        x: mx.array,
        tokens: Ids,
        caches: Sequence[LayerCache],
        states: Sequence[RecurrentState],
        lengths: Sequence[int],
    ) -> mx.array:
        """Apply the embeddings of n-grams and the mixer to at most ``BLOCK`` tokens."""
        if self.ngrams is not None:
            x = self.ngrams(x, tokens, states, lengths)
        mixed, normed = self.around_mixer.read(x)
        return self.around_mixer.write(x, self.mixer(self.mixer.project(mixed), caches, lengths, None), normed)

    @property
    def further_matrices(self) -> Sequence[tuple[Linear, ...]]:
        """The matrices of the connections and of ``ngrams``; each multiplies another vector."""
        own = (*self.around_mixer.matrices, *self.around_experts.matrices)
        return [(matrix,) for matrix in (own if self.ngrams is None else (*own, *self.ngrams.matrices))]

    @property
    def mixer_adds_residual(self) -> bool:
        """Whether the last product of the mixer adds the residual; here the connection adds it, with weights."""
        return False


@dataclass(frozen=True, slots=True)
class HyperModel(Model):
    """A model whose layers are ``HyperLayer``; ``norm`` is that of ``behind``, which reads the streams at the end.

    The cache of a sequence has the states of embeddings of n-grams behind the caches of all layers.
    """

    behind: HyperConnection

    @property
    def routers(self) -> Sequence[Router]:
        """None: the input of a router is a mix of the streams."""
        return []

    @property
    def _with_ngrams(self) -> list[int]:
        """The layers with embeddings of n-grams."""
        return [layer.index for layer in self.layers if layer.ngrams is not None]

    def new_cache(self) -> SequenceCache:
        """Return the caches of a sequence without tokens."""
        caches = [layer.mixer.new_cache() for layer in self.layers]
        return SequenceCache([*caches, *(RecurrentState() for _ in self._with_ngrams)])

    def forward(
        self, tokens: mx.array, lengths: Sequence[int], caches: Sequence[SequenceCache], context: ForwardContext
    ) -> mx.array:
        """Compute the residual streams [T, streams * hidden] of new tokens; see ``Model.forward``."""
        x = mx.tile(self.embedding.rows(tokens, self.norm.dtype), (1, self.behind.streams))
        known = np.array(tokens, np.int64)
        for index, layer in enumerate(self.layers):
            context.reach(index)
            for cache in caches:
                cache.broken = True
            states: list[RecurrentState] = []
            if layer.ngrams is not None:
                place = len(self.layers) + self._with_ngrams.index(index)
                found = [cache.layers[place] for cache in caches]
                states = [state for state in found if isinstance(state, RecurrentState)]
            x = layer(x, known, [cache.layers[index] for cache in caches], states, lengths, context)
        for cache, length in zip(caches, lengths, strict=True):
            cache.broken = False
            cache.length += length
        return x

    def logits(self, hidden: mx.array) -> mx.array:
        """Compute the logits f32 [T, vocabulary] of residual streams [T, streams * hidden], lazily."""
        return self.head(self.behind.read(hidden)[0]).astype(mx.float32)


def _blocks(lengths: Sequence[int]) -> list[Block]:
    return list(blocks(lengths, BLOCK))


def _joined(parts: Sequence[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts))
