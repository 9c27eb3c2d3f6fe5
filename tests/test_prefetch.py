"""Guesses of the next layer's experts: what is hinted when, and that nothing that is computed depends on it."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_slots_on_cpu
import mlx.core as mx
import numpy as np
import pytest

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.moe.prefetch import POLICIES
from flashmoe_mlx.stores import read_ahead

PROMPT = "Hello, store"
LAYERS = 4


def generated(engine: Engine, count: int = 12) -> list[int]:
    return [token for piece in engine.generate(PROMPT, max_tokens=count, temperature=0) for token in piece.token_ids]


def recorded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, list[int]]]:
    """What the store is asked for and told, in order."""
    calls: list[tuple[str, int, list[int]]] = []
    for name in ("fetch", "prefetch"):
        original = getattr(engine.store, name)

        def call(layer: int, experts: Sequence[int], name: str = name, original: Any = original) -> Any:
            calls.append((name, layer, list(experts)))
            return original(layer, experts)

        monkeypatch.setattr(engine.store, name, call)
    return calls


@pytest.mark.parametrize(
    "backend",
    [
        "pread",
        "mmap",
        "ram_hybrid",
        "resident",
        "pread direct",
        "ram_hybrid GPU",
        "ram_hybrid GPU direct",
        "resident GPU",
    ],
)
def test_no_policy_changes_the_tokens(tiny_pack: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *how = backend.split()
    options: dict[str, Any] = {"direct": True} if "direct" in how else {}
    if name == "ram_hybrid":
        options["budget_gib"] = 5 * LAYERS * 2**15 / 2**30
    if "GPU" in how:
        gpu_slots_on_cpu.emulate(monkeypatch)
    tokens = {}
    for policy in POLICIES:
        with flashmoe_mlx.load(tiny_pack, name, prefetch=policy, **options) as engine:
            tokens[policy] = generated(engine)
            stats = engine.stats()
        guesses = stats["guesses"]
        assert (guesses is None) == (policy == "none")
        if guesses is not None:
            assert 0 < guesses["right"] <= guesses["predicted"]
            assert guesses["accuracy"] == guesses["right"] / guesses["predicted"]
    assert all(found == tokens["none"] for found in tokens.values())


def test_previous_token_hints_what_the_layer_chose_last(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with flashmoe_mlx.load(tiny_pack, prefetch="previous_token") as engine:
        cache = engine.new_cache()
        engine.forward([1, 2], cache)
        calls = recorded(engine, monkeypatch)
        for token in (3, 4):
            engine.forward([token], cache)
    decoded = [call for call in calls if call[0] == "fetch"]
    assert [name for name, _, _ in calls] == ["fetch", "prefetch"] * 2 * LAYERS
    for number, (_, layer, experts) in enumerate(call for call in calls if call[0] == "prefetch"):
        assert layer == (number + 1) % LAYERS
        if number >= LAYERS - 1:  # what it chose before is among the calls
            assert sorted(experts) == decoded[number + 1 - LAYERS][2]


def test_early_router_hints_each_layer_before_its_mixer(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with flashmoe_mlx.load(tiny_pack, prefetch="early_router") as engine:
        cache = engine.new_cache()
        engine.forward([1, 2], cache)
        calls = recorded(engine, monkeypatch)
        for layer in engine.model.layers:  # without a mixer's part the guess is the choice itself
            monkeypatch.setattr(type(layer), "_mixed", lambda _, x, __: x)
        engine.forward([3], cache)
    assert [(name, layer) for name, layer, _ in calls] == [
        (name, layer) for layer in range(LAYERS) for name in ("prefetch", "fetch")
    ]
    for hint, fetch in zip(calls[::2], calls[1::2], strict=True):
        assert sorted(hint[2]) == fetch[2]


def test_next_router_is_the_next_layers_own_router(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this layer's experts and the next one's mixer between them the guess would be the choice itself."""
    with flashmoe_mlx.load(tiny_pack, prefetch="next_router") as engine:
        cache = engine.new_cache()
        engine.forward([1, 2], cache)
        calls = recorded(engine, monkeypatch)
        engine.forward([3], cache)
        assert [(name, layer) for name, layer, _ in calls] == [
            ("fetch", 0), ("prefetch", 1), ("fetch", 1), ("prefetch", 2), ("fetch", 2), ("prefetch", 3), ("fetch", 3),
        ]  # fmt: skip
        router, x = engine.model.layers[1].experts.router, np.random.default_rng(0).normal(size=(1, 128))
        assert engine._prefetcher is not None
        residual = mx.array(x.astype(np.float32))
        guess = engine._prefetcher.guess(0, residual)
        chosen, weights = router.choose(router.normalize(residual))
        by_weight = np.array(chosen)[0][np.argsort(-np.array(weights)[0])]
        assert np.array(guess).tolist() == [by_weight.tolist()]
        assert engine._prefetcher.guess(LAYERS - 1, residual) is None


def test_a_prompt_is_not_guessed(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with flashmoe_mlx.load(tiny_pack, prefetch="next_router") as engine:
        calls = recorded(engine, monkeypatch)
        engine.forward([1, 2, 3], engine.new_cache())
    assert {name for name, _, _ in calls} == {"fetch"}


def test_reads_ahead_are_in_the_record(tiny_pack: Path) -> None:
    with flashmoe_mlx.load(tiny_pack, prefetch="next_router") as engine:
        generated(engine, 24)
        decode, store = engine.stats()["decode"], engine.store.layout.record_bytes
    assert decode["bytes_read"] == decode["misses"] * store
    assert 0 <= decode["prefetched"] <= decode["misses"]
    assert decode["bytes_wasted"] >= 0


@pytest.mark.parametrize("backend", ["pread", "ram_hybrid"])
def test_loading_takes_what_reads_ahead_need(tiny_pack: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first measured step allocates no slots and starts no threads."""
    with flashmoe_mlx.load(tiny_pack, backend, prefetch="next_router") as engine:

        def refused(*args: Any) -> None:
            raise AssertionError("a step allocates slots")

        for kind in (read_ahead.Slab, read_ahead.HostSlots):
            monkeypatch.setattr(kind, "__init__", refused)
        threads = threading.enumerate()
        generated(engine, 4)
        assert threading.enumerate() == threads
        assert engine.stats()["guesses"]["predicted"] > 0


def test_there_is_no_such_policy(tiny_pack: Path) -> None:
    with pytest.raises(
        InputError, match="prefetch=oracle: no such policy; there are none, previous_token, next_router"
    ):
        flashmoe_mlx.load(tiny_pack, prefetch="oracle")
