"""Configurations of models with hyper-connections, embeddings of n-grams and sparse attention."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from flashmoe_mlx.layers.ngrams import NgramHash
from flashmoe_mlx.models.blocks import CacheSize, GatedDeltaNetBlock, MixerBlock
from flashmoe_mlx.models.config import layer_prefix
from flashmoe_mlx.models.feed_forward import MoeBlock
from flashmoe_mlx.models.hybrid import HybridConfig
from flashmoe_mlx.models.hyper_blocks import HyperConnectionBlock, NgramBlock, SparseAttentionBlock
from flashmoe_mlx.models.parameters import EMBEDDING, HEAD, Kind, Parameter, Table

BEHIND = "model.hyper_connection_mixer."
"""The prefix of the parameters behind the last layer."""


@dataclass(frozen=True, slots=True)
class HyperConfig(HybridConfig):
    """The sizes of a model.

    Attributes:
        sigmoid_gate: whether the output gate of GatedDeltaNet is a sigmoid rather than SiLU.
        renormalized: whether the weights of a token's routed experts sum to 1.
        streams: residual streams.
        rank: the inner width of the mixers of streams.
        index_heads: heads of queries of an indexer.
        index_dim: the width of these heads.
        index_block: tokens of a block, to which an indexer gives one score.
        index_most: blocks to which a token attends.
        ngram_layers: layers before which embeddings of n-grams are added, ascending.
        ngram_most: tokens of the longest n-gram.
        ngram_heads: hashes for each n.
        ngram_base: the least number of rows for a hash.
        ngram_divisor: the number of rows of a table is a multiple of this.
        ngram_seed: determines the hashes.
        ngram_separator: a token that no n-gram crosses.
        ngram_size: elements of the embeddings of a token.
        ngram_taps: tokens under the convolution.
    """

    norm: ClassVar[Kind] = Kind.OFFSET_NORM

    sigmoid_gate: bool
    renormalized: bool
    streams: int
    rank: int
    index_heads: int
    index_dim: int
    index_block: int
    index_most: int
    ngram_layers: tuple[int, ...]
    ngram_most: int
    ngram_heads: int
    ngram_base: int
    ngram_divisor: int
    ngram_seed: int
    ngram_separator: int
    ngram_size: int
    ngram_taps: int

    def mixer(self, layer: int) -> MixerBlock:
        """Return sparse attention or GatedDeltaNet."""
        block = HybridConfig.mixer(self, layer)
        if isinstance(block, GatedDeltaNetBlock):
            return replace(block, sigmoid_gate=self.sigmoid_gate)
        index = self.index_heads, self.index_dim, self.index_block, self.index_most
        return SparseAttentionBlock(
            self.hidden_size,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.rope,
            self.attention_bias,
            self.rms_norm_eps,
            self.norm,
            True,
            *index,
        )

    def feed_forward(self, layer: int) -> MoeBlock:  # noqa: ARG002  # equal in all layers
        """Return the mixture of experts."""
        return replace(self.mixture(), renormalized=self.renormalized, normed=False)

    def ngrams(self, layer: int) -> NgramBlock | None:
        """Return the embeddings of n-grams that are added before ``layer``."""
        if layer not in self.ngram_layers:
            return None
        words = NgramHash(
            self.ngram_most,
            self.ngram_heads,
            self.vocab_size,
            self.ngram_base,
            self.ngram_layers.index(layer),
            self.ngram_seed,
            self.ngram_separator,
        )
        sizes = self.hidden_size, self.streams, self.ngram_size, self.ngram_taps, self.ngram_divisor
        return NgramBlock(words, *sizes, self.rms_norm_eps)

    @property
    def connection(self) -> HyperConnectionBlock:
        """The connection of a mixer or of a mixture of experts."""
        return HyperConnectionBlock(self.hidden_size, self.streams, self.rank, self.rms_norm_eps)

    @property
    def last_connection(self) -> HyperConnectionBlock:
        """The connection of the head."""
        return replace(self.connection, injects=False)

    @property
    def residual_size(self) -> int:
        """The elements of all residual streams."""
        return self.streams * self.hidden_size

    @property
    def tables(self) -> tuple[Table, ...]:
        """The rows of n-grams."""
        blocks = [(layer_prefix(layer), self.ngrams(layer)) for layer in self.ngram_layers]
        return tuple(block.table(prefix) for prefix, block in blocks if block is not None)

    def cache_sizes(self, activation_bytes: int, kv_bits: int | None = None) -> list[CacheSize]:
        """Compute the sizes of the caches of all layers and of the states of n-grams."""
        blocks = filter(None, map(self.ngrams, self.ngram_layers))
        own = [block.cache_size(activation_bytes) for block in blocks]
        return [*HybridConfig.cache_sizes(self, activation_bytes, kv_bits), *own]

    def layer_parameters(self, layer: int) -> Iterator[Parameter]:
        """Yield the resident parameters of ``layer`` in the order in which a token meets them."""
        prefix, ngrams = layer_prefix(layer), self.ngrams(layer)
        if ngrams is not None:
            yield from ngrams.parameters(prefix)
        yield from self.connection.parameters(f"{prefix}attn_hyper_connection.")
        yield from self.mixer(layer).parameters(prefix)
        yield from self.connection.parameters(f"{prefix}mlp_hyper_connection.")
        yield from self.feed_forward(layer).parameters(prefix)

    def resident_parameters(self) -> Iterator[Parameter]:
        """Yield all resident parameters in the order in which a token meets them."""
        yield Parameter(EMBEDDING, Kind.MATRIX, (self.vocab_size, self.hidden_size))
        for layer in range(self.num_layers):
            yield from self.layer_parameters(layer)
        yield from self.last_connection.parameters(BEHIND)
        if not self.tie_word_embeddings:
            yield Parameter(HEAD, Kind.MATRIX, (self.vocab_size, self.hidden_size))
