"""Fixtures of all tests."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from flashmoe_mlx.pack.synthetic import SyntheticSizes, synthetic_pack


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests compare in f32 on the CPU wherever they run, unless they are about a GPU."""
    before = mx.default_device()
    on_gpu = any(request.node.get_closest_marker(name) for name in ("metal", "cuda"))
    mx.set_default_device(mx.gpu if on_gpu else mx.cpu)
    yield
    mx.set_default_device(before)


TINY = SyntheticSizes(
    num_layers=4,
    hidden_size=64,
    num_experts=16,
    experts_per_token=4,
    expert_size=64,
    shared_expert_size=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    linear_key_heads=1,
    linear_value_heads=2,
    linear_key_dim=32,
    linear_value_dim=32,
    max_context=256,
    bits=4,
    seed=0,
)
"""A model that runs in a blink; its tokens are bytes."""


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack with random weights; read only."""
    return synthetic_pack("tiny", TINY, tmp_path_factory.mktemp("cache")).folder
