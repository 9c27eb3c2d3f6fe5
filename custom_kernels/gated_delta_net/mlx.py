"""GatedDeltaNet by MLX's fused recurrence, and prompts in chunks."""

from functools import partial

import mlx.core as mx

from flashmoe_mlx.custom_kernels.gated_delta_net import chunked, reference
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import DeltaInputs, GatedDelta, Results
from flashmoe_mlx.custom_kernels.kernel import dialect

_FEWEST_IN_CHUNKS = {"cuda": 16, None: 2}
"""Number of tokens from which chunks beat MLX's recurrence, except on Metal, where MLX's kernel works in chunks."""


def gated_delta_net(inputs: DeltaInputs) -> Results:
    """Compute ``reference.gated_delta_net`` with MLX's fused recurrence."""
    return reference.gated_delta_net(inputs, partial(_mlx_rule, inputs.qkv.dtype))


def in_chunks(inputs: DeltaInputs) -> Results:
    """Compute ``reference.gated_delta_net``; many tokens in chunks where MLX's recurrence would go token by token."""
    device = dialect()
    fewest = _FEWEST_IN_CHUNKS.get(device)
    if fewest is None or len(inputs.qkv) < fewest:
        return gated_delta_net(inputs)
    rule: GatedDelta = chunked.gated_delta if device else chunked.gated_delta_on_host
    return reference.gated_delta_net(inputs, rule)


def _mlx_rule(
    dtype: mx.Dtype,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    decay: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    queries, keys, values = (part.astype(dtype) for part in (queries, keys, values))
    y, state = mx.fast.gated_delta_update(queries, keys, values, decay, beta, state)
    return y, state
