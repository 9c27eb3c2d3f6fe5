"""Random inputs of GatedDeltaNet."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.gated_delta_net.reference import DeltaInputs
from flashmoe_mlx.custom_kernels.random_inputs import Geometry, RandomInputs
from flashmoe_mlx.custom_kernels.weights import DeltaWeights


def delta_inputs(
    geometry: Geometry,
    dtype: mx.Dtype,
    *,
    tokens: int = 1,
    seed: int = 0,
    taps: int = 4,
    eps: float = 1e-6,
    sequences: int = 1,
) -> DeltaInputs:
    """Draw tokens and the states that earlier tokens left.

    Args:
        geometry: sizes of the layer.
        dtype: type of activations and weights.
        tokens: number of tokens.
        seed: seed of the random numbers.
        taps: tokens under the convolution.
        eps: epsilon of the norm.
        sequences: number of sequences, each with ``tokens`` tokens.
    """
    inputs = RandomInputs(dtype, seed)
    heads, value_width = geometry.value_heads, geometry.value_heads * geometry.value_dim
    channels = 2 * geometry.key_heads * geometry.key_dim + value_width
    weights = DeltaWeights(
        geometry.key_heads,
        heads,
        geometry.key_dim,
        geometry.value_dim,
        inputs.normal(channels, taps, 1, scale=0.5),
        inputs.normal(heads, dtype=mx.float32),
        inputs.normal(heads, dtype=mx.float32),
        inputs.normal(geometry.value_dim, scale=0.2, mean=1.0),
        eps,
    )
    tokens *= sequences
    conv_state = (taps - 1, channels) if sequences == 1 else (sequences, taps - 1, channels)
    return DeltaInputs(
        inputs.normal(tokens, channels),
        inputs.normal(tokens, value_width),
        inputs.normal(tokens, heads),
        inputs.normal(tokens, heads),
        weights,
        inputs.normal(*conv_state),
        inputs.normal(sequences, heads, geometry.value_dim, geometry.key_dim, scale=0.3, dtype=mx.float32),
    )
