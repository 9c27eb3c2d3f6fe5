"""The size of the graph that a layer adds for one token: each operation costs a launch, and Python's time to build it.

The counts are exact, so that no operation comes unseen; a smaller count is welcome.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gpu_on_cpu
import mlx.core as mx
import pytest
from systems import needs_linux

import flashmoe_mlx
from flashmoe_mlx.custom_kernels import kernel
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.layers.cache import LayerCache
from flashmoe_mlx.layers.kv_cache import KVCache
from flashmoe_mlx.models.steps import layer_step

pytestmark = needs_linux

_METAL_KERNEL = mx.fast.metal_kernel


@contextmanager
def kernels_of_mlx() -> Iterator[pytest.MonkeyPatch]:
    """Make kernels that MLX can trace, although nothing here can run them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", _METAL_KERNEL)
        kernel.compiled.cache_clear()
        yield patch
    kernel.compiled.cache_clear()


def operations(function: Callable[..., object], *arguments: mx.array) -> Counter[str]:
    """Return the operations in the graph of ``function``."""
    found: Counter[str] = Counter()

    def count(event: dict[str, str]) -> None:
        if event["type"] == "primitive":
            found[event["name"]] += 1

    mx.export_function(count, function, *arguments)
    return found


def step_operations(engine: Engine, layer: int) -> Counter[str]:
    """Return the operations of one decode step in ``layer``."""
    block = engine.model.layers[layer]
    whole = block.feed_forward.whole_layer(1)
    assert whole is not None
    x = mx.zeros((1, engine.model.norm.size), engine.model.norm.dtype)
    cache: LayerCache = block.mixer.new_cache()
    block.mixer(block.project(x), [cache], [1], x)
    states = cache.arrays()
    position, listed = (mx.zeros(4, mx.int32) for _ in range(2))
    mx.eval(states, position, listed)
    with kernels_of_mlx():

        def step(*arrays: mx.array) -> tuple[mx.array, ...]:
            following, longer, changed = layer_step(block, whole, *arrays[:3], arrays[3:])
            return following, longer, *changed

        return operations(step, x, position, listed, *states)


@pytest.fixture
def engine(tiny_pack: Path) -> Iterator[Engine]:
    with gpu_on_cpu.metal(mx.bfloat16), flashmoe_mlx.load(tiny_pack, backend="resident") as opened:
        yield opened


def test_operations_of_a_step(engine: Engine) -> None:
    recurrent = step_operations(engine, 0)
    attention = step_operations(engine, 3)
    assert isinstance(engine.model.layers[3].mixer.new_cache(), KVCache)
    # Splits and slices are views. Kernels on Metal: projections, the recurrence or attention in three, the output, the
    # router's scores, the choice, and two for the experts. Norms and sums with the residual are parts of kernels.
    assert recurrent == {"CustomKernel": 7, "Split": 1}
    assert attention == {"CustomKernel": 9, "Slice": 3}
