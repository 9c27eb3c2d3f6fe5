"""The blocks of decoder layers that mix tokens: their parameters, their construction, and the sizes of their caches."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels import AttentionWeights, DeltaWeights, Kernels
from flashmoe_mlx.custom_kernels.kv_rows import RowFormat
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.layers.attention import Attention
from flashmoe_mlx.layers.gated_delta_net import GatedDeltaNet
from flashmoe_mlx.layers.rope import Rope
from flashmoe_mlx.models.parameters import Kind, Parameter, Rows
from flashmoe_mlx.models.weights import ResidentWeights

__all__ = ["AttentionBlock", "CacheSize", "GatedDeltaNetBlock", "MixerBlock"]


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Bytes that a layer keeps for a sequence: per token, and independent of its length."""

    per_token: int = 0
    fixed: int = 0


class MixerBlock(Protocol):
    """The part of a layer that mixes tokens; ``prefix`` begins the names of the layer's parameters."""

    def parameters(self, prefix: str) -> Iterator[Parameter]:
        """Yield the parameters in the order in which a token meets them."""
        ...

    def build(self, prefix: str, weights: ResidentWeights, kernels: Kernels) -> Attention | GatedDeltaNet:
        """Make the block from its weights."""
        ...

    def cache_size(self, activation_bytes: int, kv_bits: int | None = None) -> CacheSize:
        """Compute the size of its cache for activations of ``activation_bytes`` bytes each."""
        ...

    @property
    def working_width(self) -> int:
        """The elements of a token's intermediate results, from the projections of its input to that of the output."""
        ...

    @property
    def recurrent_width(self) -> int:
        """The elements of a token's values in a recurrence."""
        ...


@dataclass(frozen=True)
class AttentionBlock:
    """Full attention with norms of queries and keys.

    Attributes:
        hidden_size: the width of a token's vector.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values.
        head_dim: the width of a head.
        rope: the rotary embedding.
        bias: whether the four projections have biases.
        eps: the epsilon of the norms.
        norm: the form in which checkpoints store the norms.
        gated: whether an output gate is beside every query.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    bias: bool
    eps: float
    norm: Kind
    gated: bool = True

    @cached_property
    def _frequencies(self) -> tuple[float, ...] | None:
        return None if self.rope.yarn is None else self.rope.frequencies()

    def parameters(self, prefix: str) -> Iterator[Parameter]:
        """Yield the parameters in the order in which a token meets them."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {
            "q_proj": ((2 if self.gated else 1) * query, self.hidden_size),
            "k_proj": (key, self.hidden_size),
            "v_proj": (key, self.hidden_size),
            "o_proj": (self.hidden_size, query),
        }
        for name, shape in shapes.items():
            yield Parameter(f"{prefix}self_attn.{name}", Kind.MATRIX, shape)
            if self.bias:
                yield Parameter(f"{prefix}self_attn.{name}.bias", Kind.PLAIN, shape[:1])
        yield Parameter(f"{prefix}self_attn.q_norm.weight", self.norm, (self.head_dim,))
        yield Parameter(f"{prefix}self_attn.k_norm.weight", self.norm, (self.head_dim,))

    def build(self, prefix: str, weights: ResidentWeights, kernels: Kernels) -> Attention:
        """Make the block from its weights.

        Raises:
            InputError: heads cannot be divided into groups of quantized keys and values; code "unsupported_kv_bits".
        """
        if not RowFormat(self.head_dim, kernels.kv_bits).is_supported:
            raise InputError(
                f"kv_bits={kernels.kv_bits}: needs heads of a multiple of 32 values; those of this model have "
                f"{self.head_dim}. Leave kv_bits out",
                code="unsupported_kv_bits",
            )
        joint = None
        if kernels.routed_experts_gpu is not None:
            joint = weights.join(*(f"{prefix}self_attn.{part}_proj" for part in "qkv"))
        return Attention(
            AttentionWeights(
                self.num_heads,
                self.num_kv_heads,
                self.head_dim,
                self.rope.dim,
                self.rope.theta,
                scaled_by_yarn(weights.vector(f"{prefix}self_attn.q_norm.weight"), self.rope),
                scaled_by_yarn(weights.vector(f"{prefix}self_attn.k_norm.weight"), self.rope),
                self.eps,
                self._frequencies,
                kernels.kv_bits,
                self.gated,
            ),
            kernels,
            weights.linear(f"{prefix}self_attn.q_proj"),
            weights.linear(f"{prefix}self_attn.k_proj"),
            weights.linear(f"{prefix}self_attn.v_proj"),
            weights.linear(f"{prefix}self_attn.o_proj"),
            joint,
        )

    def cache_size(self, activation_bytes: int, kv_bits: int | None = None) -> CacheSize:
        """Compute the size of keys and values for activations of ``activation_bytes`` bytes each."""
        row = RowFormat(self.head_dim, kv_bits).nbytes(activation_bytes)
        return CacheSize(per_token=2 * self.num_kv_heads * row)

    @property
    def working_width(self) -> int:
        """The elements of queries and gates, keys, values and results."""
        return ((3 if self.gated else 2) * self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def recurrent_width(self) -> int:
        """0: there is no recurrence."""
        return 0


@dataclass(frozen=True, slots=True)
class GatedDeltaNetBlock:
    """GatedDeltaNet: a short convolution, then the gated delta rule.

    Attributes:
        hidden_size: the width of a token's vector.
        key_heads: heads of queries and keys.
        value_heads: heads of values.
        key_dim: the width of a head of keys.
        value_dim: the width of a head of values.
        conv_kernel: tokens that the convolution sees.
        eps: the epsilon of the norm.
        interleaved: whether checkpoints have two input projections, ``in_proj_qkvz`` and ``in_proj_ba``, with rows
            sorted by key head, rather than four.
        sigmoid_gate: whether the output gate is a sigmoid rather than SiLU.
    """

    hidden_size: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    eps: float
    interleaved: bool = False
    sigmoid_gate: bool = False

    @property
    def _value_width(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def _conv_width(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self._value_width

    def parameters(self, prefix: str) -> Iterator[Parameter]:
        """Yield the parameters in the order in which a token meets them."""
        prefix += "linear_attn."
        hidden, heads = self.hidden_size, self.value_heads
        sizes = {"qkv": self._conv_width, "z": self._value_width, "b": heads, "a": heads}
        for part, rows in sizes.items():
            published = self._published_rows(prefix, part) if self.interleaved else None
            yield Parameter(f"{prefix}in_proj_{part}", Kind.MATRIX, (rows, hidden), published=published)
        yield Parameter(
            f"{prefix}conv1d.weight", Kind.CONV, (self._conv_width, self.conv_kernel, 1), draw=_random_convolution
        )
        # The decay is an exponential of an exponential of these two.
        yield Parameter(f"{prefix}A_log", Kind.EXACT, (heads,), draw=_random_a_log)
        yield Parameter(f"{prefix}dt_bias", Kind.EXACT, (heads,), draw=_random_dt_bias)
        # Every published layout stores this norm as the factor itself, even where it stores other norms less 1.
        yield Parameter(f"{prefix}norm.weight", Kind.PLAIN, (self.value_dim,))
        yield Parameter(f"{prefix}out_proj", Kind.MATRIX, (hidden, self._value_width))

    def _published_rows(self, prefix: str, part: str) -> Rows:
        """Return the rows of ``part`` in a matrix that has, for each key head, its rows of all parts in turn."""
        values = self.value_heads // self.key_heads
        if part in ("b", "a"):
            name, sizes = "in_proj_ba", {"b": values, "a": values}
        else:
            wide = values * self.value_dim
            name, sizes = "in_proj_qkvz", {"q": self.key_dim, "k": self.key_dim, "v": wide, "z": wide}
        starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
        step = sum(sizes.values())
        ranges = [(head * step + starts[one], sizes[one]) for one in part for head in range(self.key_heads)]
        return Rows(f"{prefix}{name}", self.key_heads * step, tuple(ranges))

    def build(self, prefix: str, weights: ResidentWeights, kernels: Kernels) -> GatedDeltaNet:
        """Make the block from its weights."""
        prefix += "linear_attn."
        joint = None
        if kernels.routed_experts_gpu is not None:
            joint = weights.join(*(f"{prefix}in_proj_{part}" for part in ("qkv", "z", "b", "a")))
        return GatedDeltaNet(
            DeltaWeights(
                self.key_heads,
                self.value_heads,
                self.key_dim,
                self.value_dim,
                weights.vector(f"{prefix}conv1d.weight"),
                weights.vector(f"{prefix}A_log"),
                weights.vector(f"{prefix}dt_bias"),
                weights.vector(f"{prefix}norm.weight"),
                self.eps,
            ),
            kernels,
            weights.linear(f"{prefix}in_proj_qkv"),
            weights.linear(f"{prefix}in_proj_z"),
            weights.linear(f"{prefix}in_proj_b"),
            weights.linear(f"{prefix}in_proj_a"),
            weights.linear(f"{prefix}out_proj"),
            joint,
            self.sigmoid_gate,
        )

    def cache_size(self, activation_bytes: int, kv_bits: int | None = None) -> CacheSize:  # noqa: ARG002
        """Compute the size of the convolution's inputs, of ``activation_bytes`` bytes each, and of the f32 state."""
        state = self.value_heads * self.value_dim * self.key_dim
        return CacheSize(fixed=4 * state + activation_bytes * (self.conv_kernel - 1) * self._conv_width)

    @property
    def working_width(self) -> int:
        """The elements of the convolution's inputs, of gates, decays and results."""
        return self._conv_width + 2 * self._value_width + 2 * self.value_heads

    @property
    def recurrent_width(self) -> int:
        """The elements of the values of all heads."""
        return self._value_width


def scaled_by_yarn(norm: mx.array, rope: Rope) -> mx.array:
    """Return the factors ``norm`` [head dim] times YaRN's attention factor in the rotated dimensions.

    A rotation is linear, so scaling its input equals scaling its output.
    """
    if rope.yarn is None:
        return norm
    rotated = mx.arange(len(norm)) < rope.dim
    scaled = mx.where(rotated, norm.astype(mx.float32) * rope.yarn.attention_factor, norm).astype(norm.dtype)
    mx.eval(scaled)
    return scaled


def _random_convolution(random: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.floating]:
    return random.normal(0, 0.5, shape)


def _random_a_log(random: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.floating]:
    return np.asarray(np.log(random.uniform(0.5, 16, shape)))


def _random_dt_bias(random: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.floating]:
    return random.uniform(-6, -1, shape)
