"""The kernel of GatedDeltaNet for GPUs: token by token in one dispatch, for one or several sequences."""

from collections.abc import Iterator

import mlx.core as mx

from flashmoe_mlx.custom_kernels.checks import CodePath, Sample, tokens_phrase
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import DeltaInputs, Results
from flashmoe_mlx.custom_kernels.gated_delta_net.samples import delta_inputs
from flashmoe_mlx.custom_kernels.kernel import Kernel, bits_of, dialect
from flashmoe_mlx.custom_kernels.random_inputs import Geometry
from flashmoe_mlx.custom_kernels.shapes import ModelShapes

MOST_TOKENS = 16
"""Above this number of tokens, the implementation for prompts runs, except on CUDA.

On CUDA this kernel was the fastest for all prompt lengths measured. On Metal MLX's own recurrence works in chunks, and
the two have not been compared.
"""

STEP = Kernel(
    __package__,
    "step",
    ["qkv", "z", "b", "a", "convolution", "a_log", "dt_bias", "norm", "conv_state", "recurrent_state"],
    ["y", "new_conv_state", "new_recurrent_state"],
    ["functions"],
)
_SIMDGROUPS = 16


def code_path(inputs: DeltaInputs) -> CodePath | None:
    """Return the code path of ``gated_delta_net``; None if it does not support the inputs."""
    weights, tokens = inputs.weights, len(inputs.qkv) // inputs.sequences
    if weights.key_dim % 32 or weights.value_dim % 16 or weights.value_dim * weights.key_dim > 2**15:
        return None
    if tokens > MOST_TOKENS and dialect() != "cuda":
        return None
    return ("one token of each sequence" if inputs.sequences > 1 else tokens_phrase(tokens),)


def gated_delta_net(inputs: DeltaInputs) -> Results:
    """Compute ``reference.gated_delta_net`` token by token, for inputs with a ``code_path``."""
    weights, dtype = inputs.weights, inputs.qkv.dtype
    conv_state, recurrent_state = inputs.conv_state, inputs.recurrent_state
    y, conv_state, recurrent_state = STEP(
        [
            inputs.qkv,
            inputs.z,
            inputs.b,
            inputs.a,
            weights.convolution,
            weights.a_log,
            weights.dt_bias,
            weights.norm,
            conv_state,
            recurrent_state,
        ],
        [(inputs.z.shape, dtype), (conv_state.shape, conv_state.dtype), (recurrent_state.shape, mx.float32)],
        (weights.value_heads, inputs.sequences, 1),
        32 * _SIMDGROUPS,
        {
            "T": dtype,
            "KEY_HEADS": weights.key_heads,
            "VALUE_HEADS": weights.value_heads,
            "KEY_DIM": weights.key_dim,
            "VALUE_DIM": weights.value_dim,
            "TAPS": weights.taps,
            "ROWS": weights.value_dim // _SIMDGROUPS,
            "COLUMNS": weights.key_dim // 32,
            "THREADS": 32 * _SIMDGROUPS,
            "EPS": bits_of(weights.eps),
        },
    )
    return y, conv_state, recurrent_state


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield one token, several tokens, and one of each of two sequences, with the true sizes of the model."""
    for weights in model.delta[:1]:
        geometry = Geometry(
            0, 0, 0, 0, 0, 0, weights.key_heads, weights.value_heads, weights.key_dim, weights.value_dim
        )
        for tokens, sequences in ((1, 1), (5, 1), (1, 2)):
            inputs = delta_inputs(
                geometry, model.dtype, tokens=tokens, taps=weights.taps, eps=weights.eps, sequences=sequences
            )
            if code_path(inputs) is not None:
                yield Sample((inputs,))
