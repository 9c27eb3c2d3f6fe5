"""The whole model: embedding, decoder layers, head."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx

from flashmoe_mlx.custom_kernels import Kernels
from flashmoe_mlx.layers.cache import LayerCache, SequenceCache
from flashmoe_mlx.layers.linear import Linear, parts_of
from flashmoe_mlx.layers.mlp import Mlp
from flashmoe_mlx.layers.sequences import BLOCK, blocks
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.models.prompt_memory import PromptMemory, prompt_memory
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.moe.experts import MixtureOfExperts
from flashmoe_mlx.moe.router import Router
from flashmoe_mlx.nodes.group import Nodes


class Mixer(Protocol):
    """The part of a layer in which tokens of a sequence meet: attention, or a recurrence."""

    @property
    def joint(self) -> Linear | None:
        """A matrix with the rows of all ``projections``, or None."""
        ...

    @property
    def projections(self) -> tuple[Linear, ...]:
        """The matrices of ``project``."""
        ...

    def project(self, x: mx.array) -> tuple[mx.array, ...]:
        """Apply ``projections`` to normalized hidden states [T, hidden]."""
        ...

    def __call__(
        self, projected: Sequence[mx.array], caches: Sequence[Any], lengths: Sequence[int], residual: mx.array | None
    ) -> mx.array:
        """Mix new tokens of several sequences; see ``layers.attention.Attention``."""
        ...

    def new_cache(self) -> LayerCache:
        """Return the cache of a sequence without tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer: a mixer, then a mixture of experts or an MLP."""

    index: int
    kernels: Kernels
    mixer: Mixer
    feed_forward: MixtureOfExperts | Mlp

    @property
    def further_matrices(self) -> Sequence[tuple[Linear, ...]]:
        """The matrices beside those of the mixer and of the experts, in groups that multiply the same vector."""
        return ()

    @property
    def mixer_adds_residual(self) -> bool:
        """Whether the last product of the mixer adds the residual."""
        return True


@dataclass(frozen=True, slots=True)
class DecoderLayer(Layer):
    """A layer: x + mixer(norm(x)), then x + feed_forward(norm(x))."""

    eps: float
    input_norm: mx.array

    def __call__(
        self, x: mx.array, caches: Sequence[LayerCache], lengths: Sequence[int], context: ForwardContext
    ) -> mx.array:
        """Compute [T, hidden] from [T, hidden]; the last operations stay lazy.

        Args:
            x: the residual of the new tokens of all sequences, one sequence after the other; overwritten.
            caches: the cache of each sequence in this layer.
            lengths: the number of new tokens of each sequence.
            context: shared by all layers of a pass.
        """
        clock = context.clock
        feed_forward = self.feed_forward
        if context.prefetcher is not None and isinstance(feed_forward, MixtureOfExperts):
            context.prefetcher.begins(feed_forward.layer, x)
        with clock.computing("attention"):
            x = self._mix(x, caches, lengths, context)
        clock.settle("attention", x)
        if isinstance(feed_forward, MixtureOfExperts):
            x = feed_forward(x, context)
        else:
            with clock.computing("experts"):
                x = feed_forward(x)
        clock.settle("experts", x)
        return x

    def _mix(
        self, x: mx.array, caches: Sequence[LayerCache], lengths: Sequence[int], context: ForwardContext
    ) -> mx.array:
        """Apply the mixer; many tokens in blocks, whose results are written to ``x``."""
        if len(x) <= BLOCK:
            return self.mixer(self.project(x), caches, lengths, x)
        for block in blocks(lengths, BLOCK):
            context.reach(self.index + block.rows.start / len(x) / 2)
            rows = x[block.rows]
            mixed = self.mixer(self.project(rows), caches[block.sequences], block.lengths, rows)
            mx.eval(mixed, [array for cache in caches[block.sequences] for array in cache.arrays()])
            del rows  # another reference to the memory of x would make the next line copy it
            x[block.rows] = mixed
            mx.eval(x)
        return x

    def project(self, x: mx.array) -> tuple[mx.array, ...]:
        """Normalize the residual stream [T, hidden] and apply the projections of the mixer."""
        mixer, normed_matvec = self.mixer, self.kernels.normed_matvec
        if len(x) == 1 and mixer.joint is not None and normed_matvec is not None:
            row, _ = mixer.joint.after_norm(x, self.input_norm, self.eps, normed_matvec)
            return parts_of(row, mixer.projections)
        return mixer.project(self.kernels.rms_norm(x, self.input_norm, self.eps))


@dataclass(frozen=True, slots=True)
class Model:
    """A model whose routed experts are in a store."""

    kernels: Kernels
    config: ModelConfig
    embedding: Linear
    layers: Sequence[Any]
    norm: mx.array
    head: Linear
    touched_bytes: int
    """The size of the resident weights that every pass reads: all but an embedding that is not also the head."""

    @property
    def mixtures(self) -> list[MixtureOfExperts]:
        """The mixtures of experts of all layers that have one, in the order of ``ModelConfig.moe_layers``."""
        return [layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, MixtureOfExperts)]

    @property
    def experts_k(self) -> int:
        """The number of routed experts of a token in a layer."""
        return self.mixtures[0].router.experts_k

    @property
    def dtype(self) -> mx.Dtype:
        """The type of activations."""
        return self.norm.dtype

    @property
    def routers(self) -> Sequence[Router]:
        """The routers of all layers with experts."""
        return [experts.router for experts in self.mixtures]

    @property
    def prompt_memory(self) -> PromptMemory:
        """The memory of prompt tokens."""
        return prompt_memory(self.config, self.experts_k, self.dtype.size)

    @property
    def state_bytes(self) -> int:
        """The bytes that a sequence keeps at any length."""
        return sum(cache.fixed for cache in self.config.cache_sizes(self.norm.dtype.size))

    def new_cache(self) -> SequenceCache:
        """Return the caches of a sequence without tokens."""
        return SequenceCache([layer.mixer.new_cache() for layer in self.layers])

    def on_nodes(self, nodes: Nodes, *, in_memory: bool) -> "Model":
        """Return this model as one of ``nodes``; see ``MixtureOfExperts.on_nodes``."""
        layers = [
            replace(layer, feed_forward=layer.feed_forward.on_nodes(nodes, in_memory=in_memory))
            if isinstance(layer.feed_forward, MixtureOfExperts)
            else layer
            for layer in self.layers
        ]
        return replace(self, layers=layers)

    def forward(
        self, tokens: mx.array, lengths: Sequence[int], caches: Sequence[SequenceCache], context: ForwardContext
    ) -> mx.array:
        """Compute the hidden states [T, hidden], before the final norm, of new tokens of one or several sequences.

        A pass that ends after its first layer began, by an error or by ``context.reached``, leaves
        ``broken`` set in all ``caches``.

        Args:
            tokens: the new tokens of all sequences, uint32 [T], one sequence after the other.
            lengths: the number of new tokens of each sequence; their sum is T.
            caches: the caches of each sequence, which its new tokens join.
            context: the clock, the prefetcher and the observers of the pass.

        Returns:
            One row for each token, one sequence after the other; the last operations stay lazy.
        """
        x = self.embedding.rows(tokens, self.norm.dtype)
        for index, layer in enumerate(self.layers):
            context.reach(index)
            for cache in caches:
                cache.broken = True
            x = layer(x, [cache.layers[index] for cache in caches], lengths, context)
        for cache, length in zip(caches, lengths, strict=True):
            cache.broken = False
            cache.length += length
        return x

    def logits(self, hidden: mx.array) -> mx.array:
        """Compute the logits f32 [T, vocabulary] of hidden states [T, hidden], lazily."""
        eps, normed_matvec = self.config.rms_norm_eps, self.kernels.normed_matvec
        if len(hidden) == 1 and normed_matvec is not None and self.head.bits is not None:
            y, _ = self.head.after_norm(hidden, self.norm, eps, normed_matvec)
        else:
            y = self.head(self.kernels.rms_norm(hidden, self.norm, eps))
        return y.astype(mx.float32)
