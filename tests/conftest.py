"""Fixtures of all tests."""

from collections.abc import Iterator

import mlx.core as mx
import pytest


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests compare in f32 on the CPU wherever they run, unless they are about a GPU."""
    before = mx.default_device()
    on_gpu = any(request.node.get_closest_marker(name) for name in ("metal", "cuda"))
    mx.set_default_device(mx.gpu if on_gpu else mx.cpu)
    yield
    mx.set_default_device(before)
