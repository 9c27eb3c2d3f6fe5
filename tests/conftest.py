"""Fixtures shared by all tests."""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import mlx.core as mx
import pytest
from hypothesis import settings

from flashmoe_mlx.made_models.demo import demo_folder
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.made_models.synthetic_sizes import SyntheticSizes

if TYPE_CHECKING:
    from serving import Live

# Every run draws other examples, so fewer of them per run keep the tests within their six minutes.
settings.register_profile("everyday", max_examples=40)
settings.load_profile("everyday")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all but N cases of each test marked ``sampled(N)`` as thorough; a checksum of the name chooses."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in cases.values():
        mark = found[0].get_closest_marker("sampled")
        assert mark is not None
        for item in sorted(found, key=lambda item: crc32(item.nodeid.encode()))[mark.args[0] :]:
            item.add_marker("thorough")


@pytest.fixture(scope="module", autouse=True)
def freeze_garbage() -> None:
    """Exempt all present objects from garbage collection, which would search thousands of tests each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run tests on the CPU, in f32, except for tests marked for a GPU."""
    default = mx.default_device()
    on_gpu = any(request.node.get_closest_marker(name) for name in ("metal", "cuda"))
    mx.set_default_device(mx.gpu if on_gpu else mx.cpu)
    yield
    mx.set_default_device(default)


# TF32 is not exact enough for comparisons in f32. MLX reads this variable when it first uses a GPU.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# Measured choices of instructions would differ between runs of the tests; tests of the choice unset this variable.
os.environ.setdefault("FLASHMOE_INSTRUCTIONS", "auto")

TINY = SyntheticSizes(
    num_layers=4,
    hidden_size=128,
    num_experts=16,
    experts_per_token=4,
    expert_size=128,
    shared_expert_size=128,
    num_heads=4,
    num_kv_heads=1,
    head_dim=32,
    linear_key_heads=1,
    linear_value_heads=4,
    linear_key_dim=32,
    linear_value_dim=32,
    max_context=256,
    bits=4,
    seed=0,
)
"""Sizes of a small, fast model whose tokens are bytes.

Matrices have 128 columns, since MLX 0.32.4 computes wrong results for 64 columns on CUDA.
"""


@pytest.fixture(scope="session")
def demo_pack() -> Path:
    """Return the pack of the demo model, with 8 layers of 64 experts. Tests must not write to it."""
    return demo_folder()


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pack with random weights and the sizes ``TINY``. Tests must not write to it."""
    return synthetic_pack("tiny", TINY, tmp_path_factory.mktemp("cache")).folder


@pytest.fixture(scope="session")
def live(demo_pack: Path) -> "Iterator[Live]":
    """Serve the demo model to all tests."""
    from serving import serve  # starlette and uvicorn, which tests of other areas do not need

    with serve(demo_pack) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start Chromium: the system's, or the one of playwright."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("chromium-browser")
        running = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()
