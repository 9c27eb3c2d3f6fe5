"""Sizes of a synthetic model, in a module without MLX for the command line."""

from dataclasses import dataclass


@dataclass
class SyntheticSizes:
    """Sizes under the names of the fields of the model's configuration.

    Attributes:
        bits: the width of routed experts and of most resident matrices.
        seed: determines all weights.
    """

    num_layers: int
    hidden_size: int
    num_experts: int
    experts_per_token: int
    expert_size: int
    shared_expert_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    linear_key_heads: int
    linear_value_heads: int
    linear_key_dim: int
    linear_value_dim: int
    max_context: int
    bits: int
    seed: int
