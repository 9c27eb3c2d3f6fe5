"""Every resident tensor of a Qwen3.5-MoE model: its name, its shape, and how published checkpoints store it.

Names are those of mlx-community checkpoints without their ``language_model.`` prefix. Routed experts are not here: they
stay in storage.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.record import GROUP_SIZES, QUANTIZED_BITS
from flashmoe_mlx.models.config import ModelConfig


class Kind(Enum):
    """How a parameter may be stored."""

    MATRIX = auto()
    """``name.weight`` [out, in], dense or quantised with ``name.scales`` and ``name.biases``."""
    NORM = auto()
    """The factor of an RMS norm; Hugging Face checkpoints store it less 1."""
    CONV = auto()
    """Depthwise convolution [channels, kernel, 1]; Hugging Face has [channels, 1, kernel], the same bytes."""
    PLAIN = auto()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A resident tensor; ``name`` has no ``.weight`` if the kind is MATRIX, and is the full name otherwise."""

    name: str
    kind: Kind
    shape: tuple[int, ...]


def resident_parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Yield all resident parameters of a model, in the order in which a token meets them."""
    hidden = config.hidden_size
    yield Parameter("model.embed_tokens", Kind.MATRIX, (config.vocab_size, hidden))
    for layer, full_attention in enumerate(config.full_attention):
        prefix = f"model.layers.{layer}."
        yield Parameter(prefix + "input_layernorm.weight", Kind.NORM, (hidden,))
        yield from (_attention if full_attention else _gated_delta_net)(config, prefix)
        yield Parameter(prefix + "post_attention_layernorm.weight", Kind.NORM, (hidden,))
        yield Parameter(prefix + "mlp.gate", Kind.MATRIX, (config.num_experts, hidden))
        yield Parameter(prefix + "mlp.shared_expert.gate_proj", Kind.MATRIX, (config.shared_expert_size, hidden))
        yield Parameter(prefix + "mlp.shared_expert.up_proj", Kind.MATRIX, (config.shared_expert_size, hidden))
        yield Parameter(prefix + "mlp.shared_expert.down_proj", Kind.MATRIX, (hidden, config.shared_expert_size))
        yield Parameter(prefix + "mlp.shared_expert_gate", Kind.MATRIX, (1, hidden))
    yield Parameter("model.norm.weight", Kind.NORM, (hidden,))
    if not config.tie_word_embeddings:
        yield Parameter("lm_head", Kind.MATRIX, (config.vocab_size, hidden))


_CHOOSING = (".mlp.gate", ".mlp.shared_expert_gate")
_CHOOSING_BITS = 8


def least_bits(name: str, bits: int) -> int:
    """Return the width for the matrix ``name`` where others are quantised to ``bits``.

    Matrices that decide between experts get 8 bits, as from mlx_lm: a wrong choice costs more than their few bytes.
    """
    return max(bits, _CHOOSING_BITS) if name.endswith(_CHOOSING) else bits


def _attention(config: ModelConfig, prefix: str) -> Iterator[Parameter]:
    prefix += "self_attn."
    hidden, query, key = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "q_proj": (2 * query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
    }
    for name, shape in shapes.items():
        yield Parameter(prefix + name, Kind.MATRIX, shape)
        if config.attention_bias:
            yield Parameter(f"{prefix}{name}.bias", Kind.PLAIN, shape[:1])
    yield Parameter(prefix + "q_norm.weight", Kind.NORM, (config.head_dim,))
    yield Parameter(prefix + "k_norm.weight", Kind.NORM, (config.head_dim,))


def _gated_delta_net(config: ModelConfig, prefix: str) -> Iterator[Parameter]:
    prefix += "linear_attn."
    hidden, heads = config.hidden_size, config.linear_value_heads
    yield Parameter(prefix + "in_proj_qkv", Kind.MATRIX, (config.conv_width, hidden))
    yield Parameter(prefix + "in_proj_z", Kind.MATRIX, (config.value_width, hidden))
    yield Parameter(prefix + "in_proj_b", Kind.MATRIX, (heads, hidden))
    yield Parameter(prefix + "in_proj_a", Kind.MATRIX, (heads, hidden))
    yield Parameter(prefix + "conv1d.weight", Kind.CONV, (config.conv_width, config.linear_conv_kernel, 1))
    yield Parameter(prefix + "A_log", Kind.PLAIN, (heads,))
    yield Parameter(prefix + "dt_bias", Kind.PLAIN, (heads,))
    # Unlike the other norms this one is stored as the factor itself, in every published layout.
    yield Parameter(prefix + "norm.weight", Kind.PLAIN, (config.linear_value_dim,))
    yield Parameter(prefix + "out_proj", Kind.MATRIX, (hidden, config.value_width))


def quantisation_of(
    name: str, dense: tuple[int, ...], weight: tuple[int, ...], scales: tuple[int, ...]
) -> tuple[int, int]:
    """Return (bits, group size) of an affine-quantised matrix, from its shapes alone.

    Conversions differ in which matrices they keep at 8 bits, and the config of an old one does not say; the shapes
    always do.

    Raises:
        InputError: the shapes fit no supported quantisation of a ``dense`` [..., out, in] matrix.
    """
    columns = dense[-1]
    for bits in QUANTIZED_BITS:
        for group_size in GROUP_SIZES:
            packed = (*dense[:-1], columns * bits // 32)
            groups = (*dense[:-1], columns // group_size)
            if columns % group_size == 0 and columns * bits % 32 == 0 and (weight, scales) == (packed, groups):
                return bits, group_size
    raise InputError(
        f"{name}: weight {list(weight)} with scales {list(scales)} is no supported quantisation of {list(dense)}"
    )
