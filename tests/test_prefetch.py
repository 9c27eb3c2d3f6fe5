"""Guesses of the next layer's experts: the hints of each policy, and that results do not depend on them."""

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_slots_on_cpu
import mlx.core as mx
import numpy as np
import pytest

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.layers.linear import Linear
from flashmoe_mlx.moe.prefetch import (
    POLICIES,
    EarlyRouter,
    Guesses,
    NextRouter,
    Prefetcher,
    PreviousToken,
    make_prefetcher,
)
from flashmoe_mlx.moe.router import Router
from flashmoe_mlx.stores import read_ahead

PROMPT = "Hello, store"
LAYERS = 4


def generated(engine: Engine, count: int = 12) -> list[int]:
    return [token for piece in engine.generate(PROMPT, max_tokens=count, temperature=0) for token in piece.token_ids]


def recorded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, list[int]]]:
    """Return a list to which the fetches and hints of the store are appended, in order."""
    calls: list[tuple[str, int, list[int]]] = []
    for name in ("fetch", "prefetch"):
        original = getattr(engine.store, name)

        def call(layer: int, experts: Sequence[int], *more: Any, name: str = name, original: Any = original) -> Any:
            calls.append((name, layer, list(experts)))
            return original(layer, experts, *more)

        monkeypatch.setattr(engine.store, name, call)
    return calls


@pytest.fixture(scope="module")
def expected_tokens(tiny_pack: Path) -> object:
    """The tokens with all experts in memory, on a CPU."""
    mx.set_default_device(mx.cpu)
    with flashmoe_mlx.load(tiny_pack, "resident") as engine:
        return generated(engine)


@pytest.mark.parametrize(
    "backend",
    [
        "pread",
        "mmap",
        "ram_hybrid",
        "resident",
        "pread direct",
        "pread GPU",
        "mmap GPU",
        "ram_hybrid GPU",
        "ram_hybrid GPU direct",
        "resident GPU",
    ],
)
@pytest.mark.sampled(4)
def test_no_policy_changes_the_tokens(
    tiny_pack: Path, backend: str, expected_tokens: object, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert tokens["none"] == expected_tokens


def test_previous_token_hints_the_previous_choice_of_the_layer(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        if number >= LAYERS - 1:  # the layer's choice for the previous token is among the calls
            assert sorted(experts) == decoded[number + 1 - LAYERS][2]


def test_early_router_hints_each_layer_before_its_mixer(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with flashmoe_mlx.load(tiny_pack, prefetch="early_router") as engine:
        cache = engine.new_cache()
        engine.forward([1, 2], cache)
        calls = recorded(engine, monkeypatch)
        for layer in engine.model.layers:  # without the mixer the guess is the choice itself
            monkeypatch.setattr(type(layer.mixer), "__call__", lambda *arguments: arguments[-1])
        engine.forward([3], cache)
    assert [(name, layer) for name, layer, _ in calls] == [
        (name, layer) for layer in range(LAYERS) for name in ("prefetch", "fetch")
    ]
    for hint, fetch in zip(calls[::2], calls[1::2], strict=True):
        assert sorted(hint[2]) == fetch[2]


def test_next_router_guesses_with_the_router_of_the_next_layer(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this layer's experts and the next layer's mixer, the guess would be the choice itself."""
    with flashmoe_mlx.load(tiny_pack, prefetch="next_router") as engine:
        cache = engine.new_cache()
        engine.forward([1, 2], cache)
        calls = recorded(engine, monkeypatch)
        engine.forward([3], cache)
        assert [(name, layer) for name, layer, _ in calls] == [
            ("fetch", 0), ("prefetch", 1), ("fetch", 1), ("prefetch", 2), ("fetch", 2), ("prefetch", 3), ("fetch", 3),
        ]  # fmt: skip
        router, x = engine.model.layers[1].feed_forward.router, np.random.default_rng(0).normal(size=(1, 128))
        prefetcher = engine.runner._prefetcher
        assert prefetcher is not None
        residual = mx.array(x.astype(np.float32))
        guess = prefetcher.guess(0, residual)
        chosen, weights = router.choose(router.normalize(residual))
        by_weight = np.array(chosen)[0][np.argsort(-np.array(weights)[0])]
        assert np.array(guess).tolist() == [by_weight.tolist()]
        assert prefetcher.guess(LAYERS - 1, residual) is None


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
def test_loading_allocates_for_reads_ahead(tiny_pack: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_unknown_policy_is_refused(tiny_pack: Path) -> None:
    with pytest.raises(
        InputError, match="prefetch=oracle: unknown policy; choose from none, previous_token, next_router"
    ):
        flashmoe_mlx.load(tiny_pack, prefetch="oracle")


# Several sequences in one decode step


class HintedStore:
    """A store that keeps a list of the hints."""

    def __init__(self) -> None:
        self.hints: list[tuple[int, list[int]]] = []
        self.source = SimpleNamespace(num_layers=2)

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        self.hints.append((layer, list(experts)))


def routers(k: int, experts: int = 6) -> list[Router]:
    """Return two layers' routers. Layer 0 scores an expert by the input of its index, layer 1 by that of the mirrored
    index.
    """
    eye = mx.eye(experts)
    return [Router(Linear(gate), mx.ones(experts), 1e-6, k, Linear(eye[:1])) for gate in (eye, eye[::-1])]


def chosen(*rows: list[int]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.array(rows, np.uint32)


def step(prefetcher: Prefetcher, sequences: Sequence[Guesses], x: mx.array, *choices: Any) -> None:
    """Run the two layers of one decode step, whose residual stays ``x`` [T, experts]."""
    prefetcher.begin_pass(sequences, [1] * len(sequences), decoding=True)
    for layer, choice in enumerate(choices):
        prefetcher.begins(layer, x)
        guess = prefetcher.guess(layer, x)
        prefetcher.chosen(layer, choice, guess)


def test_the_likeliest_experts_of_every_sequence_are_hinted_first() -> None:
    store = HintedStore()
    prefetcher = EarlyRouter(store, routers(k=3))  # type: ignore[arg-type]
    first, second = Guesses(), Guesses()
    x = mx.array([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 3.0, 5.0, 6.0, 4.0, 2.0]])
    step(prefetcher, [first, second], x, chosen([0, 1, 5], [0, 1, 5]), chosen([3, 4, 5], [0, 1, 2]))
    assert store.hints == [(0, [0, 3, 1, 2, 4]), (1, [5, 2, 4, 3, 1])]
    assert (first.predicted, first.correct) == (6, 2 + 3)
    assert (second.predicted, second.correct) == (6, 0 + 2)


def test_the_next_router_guesses_for_every_sequence() -> None:
    store = HintedStore()
    prefetcher = NextRouter(store, routers(k=2))  # type: ignore[arg-type]
    first, second = Guesses(), Guesses()
    x = mx.array([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    step(prefetcher, [first, second], x, chosen([0, 1], [4, 5]), chosen([4, 5], [2, 3]))
    assert store.hints == [(1, [5, 0, 4, 1])]
    assert (first.predicted, first.correct) == (2, 2)
    assert (second.predicted, second.correct) == (2, 0)


def test_sequences_may_start_and_end_at_any_step() -> None:
    """The experts of the previous token belong to the sequence, whichever sequences run beside it."""
    store = HintedStore()
    prefetcher = PreviousToken(store, num_layers=2)  # type: ignore[arg-type]
    first, second, x = Guesses(), Guesses(), mx.zeros((1, 6))
    step(prefetcher, [first], x, chosen([0, 1]), chosen([2, 3]))
    step(prefetcher, [second, first], x, chosen([4, 5], [0, 1]), chosen([1, 2], [2, 5]))
    step(prefetcher, [second], x, chosen([4, 5]), chosen([0, 1]))
    assert store.hints == [
        (0, [0, 1]),  # after the first step, for the first sequence
        (1, [2, 3]),  # the second sequence has no previous token
        (0, [4, 0, 5, 1]),
        (1, [1, 2]),
        (0, [4, 5]),
    ]
    assert (first.predicted, first.correct) == (4, 2 + 1)
    assert (second.predicted, second.correct) == (4, 2 + 1)


def test_the_last_row_of_each_prompt_is_its_latest_token() -> None:
    store, guesses, other = HintedStore(), Guesses(), Guesses()
    prefetcher = PreviousToken(store, num_layers=2)  # type: ignore[arg-type]
    prefetcher.begin_pass([guesses, other], [2, 1], decoding=False)
    for layer in range(2):
        prefetcher.begins(layer, mx.zeros((3, 6)))
        prefetcher.chosen(layer, chosen([0, 1], [2, 3], [4, 5]), prefetcher.guess(layer, mx.zeros((3, 6))))
    assert store.hints == []
    assert guesses.last == {0: [2, 3], 1: [2, 3]}
    assert other.last == {0: [4, 5], 1: [4, 5]}
    assert guesses.predicted == 0


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_guesses_of_a_sequence_do_not_depend_on_other_sequences(policy: str) -> None:
    random = np.random.default_rng(5)
    inputs = [mx.array(random.normal(size=(3, 6)).astype(np.float32)) for _ in range(6)]
    choices = [[np.sort(random.permuted([np.arange(6)] * 3, axis=1)[:, :2]).astype(np.uint32)] * 2 for _ in inputs]

    def counted(rows: list[int]) -> list[tuple[int, int]]:
        store, sequences = HintedStore(), [Guesses() for _ in rows]
        prefetcher = make_prefetcher(policy, store, routers(2))  # type: ignore[arg-type]
        assert prefetcher is not None
        for x, choice in zip(inputs, choices, strict=True):
            step(prefetcher, sequences, x[mx.array(rows)], *(layer[rows] for layer in choice))
        return [(guesses.predicted, guesses.correct) for guesses in sequences]

    together = counted([0, 1, 2])
    assert together == [counted([row])[0] for row in range(3)]
    assert all(predicted > correct > 0 for predicted, correct in together)
