"""Geometries of the models that the probe makes: those of Qwen3.5-397B and Qwen3.5-35B, with four layers."""

from collections.abc import Mapping
from dataclasses import replace

from flashmoe_mlx.made_models.synthetic_sizes import SyntheticSizes

_LARGE = SyntheticSizes(
    num_layers=4,
    hidden_size=4096,
    num_experts=64,
    experts_per_token=10,
    expert_size=1024,
    shared_expert_size=1024,
    num_heads=32,
    num_kv_heads=2,
    head_dim=256,
    linear_key_heads=16,
    linear_value_heads=64,
    linear_key_dim=128,
    linear_value_dim=128,
    max_context=4096,
    bits=4,
    seed=0,
)
_SMALL = replace(_LARGE, hidden_size=2048, expert_size=512, shared_expert_size=512, num_heads=16, linear_value_heads=32)

SIZES: Mapping[str, SyntheticSizes] = {"large": _LARGE, "small": _SMALL}
"""Sizes by name: "large" is Qwen3.5-397B, "small" is Qwen3.5-35B."""
