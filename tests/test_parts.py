"""Tests that experts applied as they arrive give the results of a fetch that waits, to the last bit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import needs_io_uring

import flashmoe_mlx
from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.custom_kernels.random_inputs import GEOMETRIES
from flashmoe_mlx.custom_kernels.routed_experts import cpu
from flashmoe_mlx.custom_kernels.routed_experts.samples import expert_inputs
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.stores.delivery import Delivery

needs_extension = pytest.mark.skipif(native.extension() is None, reason="the extension was not built")
BACKENDS: list[Any] = [
    ("pread", {}),
    ("mmap", {}),
    ("ram_hybrid", {"budget_gib": 0.001}),
    pytest.param(("io_uring", {"direct": False}), marks=needs_io_uring),
    pytest.param(("ram_hybrid", {"budget_gib": 0.001, "reader": "io_uring"}), marks=needs_io_uring),
]


def logits(engine: Engine, tokens: Sequence[int]) -> bytes:
    """Return the bytes of the logits of all steps, one token each."""
    cache = engine.new_cache()
    return b"".join(np.asarray(engine.forward([token], cache)).tobytes() for token in tokens)


@needs_extension
@pytest.mark.parametrize("prefetch", ["none", "early_router"])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda value: "-".join(map(str, (value[0], *value[1].values()))))
@pytest.mark.sampled(5)
def test_every_backend(
    backend: tuple[str, dict[str, Any]], prefetch: str, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = backend
    tokens = [5, 17, 3, 5, 200, 41]
    with flashmoe_mlx.load(tiny_pack, name, prefetch=prefetch, **options) as engine:
        in_parts = logits(engine, tokens)
        stats = engine.store.stats()
        assert stats.overlapped_seconds > 0 or stats.hits == stats.requests
    fetch = ExpertStore.fetch

    def blocking(store: ExpertStore, layer: int, experts: Sequence[int], arrived: Any = None) -> Any:
        batch = fetch(store, layer, experts)
        if arrived is not None:
            arrived(experts, batch)
        return batch

    monkeypatch.setattr(ExpertStore, "fetch", blocking)
    with flashmoe_mlx.load(tiny_pack, name, prefetch=prefetch, **options) as engine:
        assert logits(engine, tokens) == in_parts
        assert engine.store.stats().overlapped_seconds == 0


@needs_extension
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_order_of_arrival(data: st.DataObject) -> None:
    tokens, choices = data.draw(st.integers(1, native.few_tokens())), data.draw(st.integers(1, 4))
    width = st.sampled_from(native.BITS)
    bits, fused = data.draw(width | st.tuples(width, width, width)), data.draw(st.booleans())
    drawn = expert_inputs(
        GEOMETRIES["small"],
        mx.float32,
        group_size=32,
        bits=bits,
        tokens=tokens,
        k=choices,
        shared=fused,
        seed=data.draw(st.integers(0, 9)),
    )
    count, records = len(drawn.slab), drawn.records
    random, residual = np.random.default_rng(0), mx.ones_like(drawn.x)
    rows = np.sort(np.stack([random.permutation(count)[:choices] for _ in range(tokens)]), axis=1).astype(np.int32)
    x, weights, form, shared = drawn.x, drawn.routing_weights, drawn.form, drawn.shared
    whole = cpu.routed_experts(x, records, mx.array(rows), weights, form, shared, residual)
    outputs = cpu.ExpertOutputs(x, choices, form, shared)
    order = data.draw(st.permutations(range(count)))
    cut = data.draw(st.integers(0, count))
    for part in (order[:cut], order[cut:]):
        places = np.full(count, -1, np.int32)
        places[list(part)] = range(len(part))
        outputs.compute([records[expert] for expert in part], places[rows])
    assert np.array(outputs.sum(weights, residual)).tobytes() == np.array(whole).tobytes()


def test_a_store_that_delivers_nothing() -> None:
    """The end of the fetch then delivers all experts at once."""
    received: list[Sequence[int]] = []
    delivery = Delivery(lambda experts, _: received.append(experts), 2)
    delivery.finish([4, 2, 4], None)  # type: ignore[arg-type]
    assert received == [[4, 2, 4]]
    assert delivery.overlapped == 0
