"""Sizes of a synthetic model, apart from its making: the command line reads them without MLX."""

from dataclasses import dataclass


@dataclass
class SyntheticSizes:
    """Sizes as in ``ModelConfig``; ``bits`` of the routed experts and of most resident matrices."""

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
