"""The whole model: embedding, decoder layers, head."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels import Kernels
from flashmoe_mlx.layers.attention import Attention
from flashmoe_mlx.layers.cache import AttentionCache, DeltaCache, SequenceCache
from flashmoe_mlx.layers.gated_delta_net import GatedDeltaNet
from flashmoe_mlx.layers.linear import Linear
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.moe.experts import MixtureOfExperts


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """A layer: x + mixer(norm(x)), then x + experts(norm(x))."""

    kernels: Kernels
    eps: float
    input_norm: mx.array
    mixer: Attention | GatedDeltaNet
    experts: MixtureOfExperts

    def __call__(
        self,
        x: mx.array,
        cache: AttentionCache | DeltaCache,
        context: ForwardContext,
    ) -> mx.array:
        """Compute [T, hidden] from [T, hidden]; the end stays lazy."""
        clock = context.clock
        if context.prefetcher is not None:
            context.prefetcher.begins(self.experts.layer, x)
        with clock.computing("attention"):
            x = self._mixed(x, cache)
        clock.settle("attention", x)
        x = self.experts(x, context)
        clock.settle("experts", x)
        return x

    def _mixed(self, x: mx.array, cache: AttentionCache | DeltaCache) -> mx.array:
        normed = self.kernels.rms_norm(x, self.input_norm, self.eps)
        if isinstance(self.mixer, Attention):
            assert isinstance(cache, AttentionCache)
            return self.mixer(normed, cache, x)
        assert isinstance(cache, DeltaCache)
        return self.mixer(normed, cache, x)


@dataclass(frozen=True, slots=True)
class Model:
    """A model whose routed experts are in a store."""

    kernels: Kernels
    config: ModelConfig
    embedding: Linear
    layers: Sequence[DecoderLayer]
    norm: mx.array
    head: Linear
    touched_bytes: int
    """Size of the resident weights that every pass reads: all but an embedding that is not the head as well."""

    def forward(
        self,
        token_ids: Sequence[int],
        cache: SequenceCache,
        context: ForwardContext,
    ) -> mx.array:
        """Compute the hidden states [T, hidden], before the final norm, of tokens that follow those in ``cache``.

        A pass that ``context.before_layer`` or an error ends after its first layer began leaves ``cache.broken`` set.
        """
        x = self.embedding.rows(mx.array(list(token_ids), mx.uint32), self.norm.dtype)
        for index, (layer, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            if context.before_layer is not None:
                context.before_layer(index)
            cache.broken = True
            x = layer(x, layer_cache, context)
        cache.broken = False
        cache.length += len(token_ids)
        return x

    def logits(self, hidden: mx.array) -> mx.array:
        """Compute the logits f32 [T, vocabulary] of hidden states [T, hidden], lazily."""
        normed = self.kernels.rms_norm(hidden, self.norm, self.config.rms_norm_eps)
        return self.head(normed).astype(mx.float32)
