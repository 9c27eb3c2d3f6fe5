"""The blocks of models with hyper-connections: their parameters, their construction, and the sizes of their caches."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels import AttentionWeights, Kernels
from flashmoe_mlx.layers.hyper_connections import HyperConnection
from flashmoe_mlx.layers.ngrams import NgramHash, NgramLayer
from flashmoe_mlx.layers.sparse_attention import Indexer, SparseAttention
from flashmoe_mlx.models.blocks import AttentionBlock, CacheSize, scaled_by_yarn
from flashmoe_mlx.models.parameters import Kind, Parameter, Table
from flashmoe_mlx.models.weights import ResidentWeights


@dataclass(frozen=True, slots=True)
class HyperConnectionBlock:
    """The connection of a block to the residual streams.

    Attributes:
        hidden_size: the width of a stream.
        streams: the number of streams.
        rank: the inner width of the mixer.
        eps: the epsilon of the norm.
        injects: whether the output of a block is added to the streams.
    """

    hidden_size: int
    streams: int
    rank: int
    eps: float
    injects: bool = True

    def parameters(self, prefix: str) -> Iterator[Parameter]:
        """Yield the parameters in the order in which a token meets them; ``prefix`` ends in a period."""
        wide = self.streams * self.hidden_size
        yield Parameter(f"{prefix}hc_norm.weight", Kind.OFFSET_NORM, (wide,))
        yield Parameter(f"{prefix}input_mix_weight_down", Kind.MATRIX, (self.rank, wide))
        yield Parameter(f"{prefix}input_mix_weight_up", Kind.MATRIX, (wide, self.rank))
        if self.injects:
            yield Parameter(f"{prefix}block_inject_weight", Kind.MATRIX, (self.streams, wide))

    def build(self, prefix: str, weights: ResidentWeights) -> HyperConnection:
        """Make the connection from its weights."""
        return HyperConnection(
            self.streams,
            weights.vector(f"{prefix}hc_norm.weight"),
            self.eps,
            weights.linear(f"{prefix}input_mix_weight_down"),
            weights.linear(f"{prefix}input_mix_weight_up"),
            weights.linear(f"{prefix}block_inject_weight") if self.injects else None,
        )


@dataclass(frozen=True)
class SparseAttentionBlock(AttentionBlock):
    """Full attention to tokens that an indexer selects.

    Attributes:
        index_heads: heads of queries of the indexer.
        index_dim: the width of these heads.
        index_block: tokens of a block.
        index_most: blocks to which a token attends.
    """

    index_heads: int = 1
    index_dim: int = 1
    index_block: int = 1
    index_most: int = 1

    def parameters(self, prefix: str) -> Iterator[Parameter]:
        """Yield the parameters in the order in which a token meets them."""
        yield from super().parameters(prefix)
        prefix += "self_attn.indexer."
        yield Parameter(
            f"{prefix}index_qk_proj", Kind.MATRIX, ((self.index_heads + 1) * self.index_dim, self.hidden_size)
        )
        yield Parameter(f"{prefix}q_layernorm.weight", self.norm, (self.index_dim,))
        yield Parameter(f"{prefix}k_layernorm.weight", self.norm, (self.index_dim,))

    def build(self, prefix: str, weights: ResidentWeights, kernels: Kernels) -> SparseAttention:
        """Make the block from its weights."""
        attention = super().build(prefix, weights, kernels)
        prefix += "self_attn.indexer."
        frequencies = attention.weights.frequencies
        index_weights = AttentionWeights(
            self.index_heads,
            1,
            self.index_dim,
            self.rope.dim,
            self.rope.theta,
            scaled_by_yarn(weights.vector(f"{prefix}q_layernorm.weight"), self.rope),
            scaled_by_yarn(weights.vector(f"{prefix}k_layernorm.weight"), self.rope),
            self.eps,
            frequencies,
        )
        indexer = Indexer(weights.linear(f"{prefix}index_qk_proj"), index_weights, self.index_block, self.index_most)
        return SparseAttention(
            attention.weights,
            kernels,
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
            indexer=indexer,
        )

    def cache_size(self, activation_bytes: int, kv_bits: int | None = None) -> CacheSize:
        """Compute the size of keys and values, and of the indexer's keys; the keys of blocks are few."""
        size = super().cache_size(activation_bytes, kv_bits).per_token
        return CacheSize(size + self.index_dim * activation_bytes)

    @property
    def working_width(self) -> int:
        """The elements of queries and gates, keys, values and results."""
        return super().working_width + (self.index_heads + 1) * self.index_dim


@dataclass(frozen=True, slots=True)
class NgramBlock:
    """Embeddings of n-grams, added to the residual streams before a layer.

    Attributes:
        hash: selects rows of the table.
        hidden_size: the width of a stream.
        streams: the number of streams.
        embedding_size: the elements of all rows of a token together.
        taps: tokens under the convolution.
        divisor: the number of rows of the table is a multiple of this.
        eps: the epsilon of the norms.
    """

    hash: NgramHash
    hidden_size: int
    streams: int
    embedding_size: int
    taps: int
    divisor: int
    eps: float

    @property
    def _wide(self) -> int:
        return self.streams * self.hidden_size

    def parameters(self, prefix: str) -> Iterator[Parameter]:
        """Yield the resident parameters in the order in which a token meets them; ``prefix`` is that of the layer."""
        prefix += "ple."
        yield Parameter(f"{prefix}key_proj", Kind.MATRIX, (self._wide, self.embedding_size))
        yield Parameter(f"{prefix}value_proj", Kind.MATRIX, (self.hidden_size, self.embedding_size))
        for name in ("norm_key", "norm_query", "norm_conv"):
            yield Parameter(f"{prefix}{name}.weight", Kind.OFFSET_NORM, (self._wide,))
        yield Parameter(f"{prefix}conv1d.weight", Kind.CONV, (self._wide, self.taps, 1), draw=_random_convolution)

    def table(self, prefix: str) -> Table:
        """Return the table."""
        hashes = (self.hash.most - 1) * self.hash.heads
        rows = -(-int(self.hash.sizes.sum()) // self.divisor) * self.divisor
        return Table(f"{prefix}ple.ple_embedding.ngram_embedding", rows, self.embedding_size // hashes)

    def build(self, prefix: str, weights: ResidentWeights) -> NgramLayer:
        """Make the block from its weights.

        Raises:
            PackError: the table is missing, or a tensor states another hash.
        """
        own = f"{prefix}ple.ple_embedding."
        weights.check_integers(f"{own}layer_multipliers", self.hash.multipliers)
        weights.check_integers(f"{own}ngram_heads_vocab_sizes", self.hash.sizes)
        weights.check_integers(f"{own}ngram_heads_offsets", self.hash.offsets)
        table = weights.table(self.table(prefix))
        prefix += "ple."
        return NgramLayer(
            self.hash,
            table,
            self.streams,
            self.eps,
            weights.linear(f"{prefix}key_proj"),
            weights.linear(f"{prefix}value_proj"),
            weights.vector(f"{prefix}norm_key.weight"),
            weights.vector(f"{prefix}norm_query.weight"),
            weights.vector(f"{prefix}norm_conv.weight"),
            weights.vector(f"{prefix}conv1d.weight"),
        )

    def cache_size(self, activation_bytes: int) -> CacheSize:
        """Compute the size of the convolution's inputs, of ``activation_bytes`` bytes each, and of the tokens."""
        kept = (self.taps - 1) * self.hash.most * self._wide
        return CacheSize(fixed=kept * activation_bytes + 4 * (self.hash.most - 1))


def _random_convolution(random: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.floating]:
    return random.normal(0, 0.5, shape)
