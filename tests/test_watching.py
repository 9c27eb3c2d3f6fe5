"""Reports of passes to a watcher: complete, equal to the counters, and without an effect on the answers."""

from pathlib import Path
from typing import Any

import gpu_on_cpu
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from conftest import TINY
from systems import needs_linux

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.pass_meter import WatchedPass
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.sampling import ChosenSampling, SamplingOptions
from flashmoe_mlx.generation.scheduler import Scheduler
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.stores.contract import StoreStats

PROMPTS = ([5, 17, 42, 8, 3], [64, 12, 7])
K = TINY.experts_per_token
HALF = TINY.num_layers * TINY.num_experts * 32768 / 2 / 2**30
"""Half of the experts, in GiB."""


def answer(engine: Engine, prompts: Any = PROMPTS, tokens: int = 6) -> list[Sequence]:
    sequences = [
        engine.runner.begin(Request(prompt, ChosenSampling(SamplingOptions()), max_tokens=tokens)) for prompt in prompts
    ]
    scheduler = Scheduler(engine.runner, together=2, prefill_tokens=4)
    for sequence in sequences:
        scheduler.add(sequence)
    with engine.runner.exclusive():
        while scheduler.unfinished:
            for change in scheduler.step():
                if change.error is not None:
                    raise change.error
    return sequences


def choices(watched: WatchedPass) -> npt.NDArray[np.integer]:
    """Return the choices of a pass as [layers, T, K]."""
    ordered = sorted(watched.choices, key=lambda choice: choice[0])
    assert [layer for layer, _ in ordered] == list(range(TINY.num_layers))
    return np.stack([experts.reshape(sum(watched.parts.values()), -1) for _, experts in ordered])


def assert_complete(seen: list[WatchedPass], sequences: list[Sequence], total: StoreStats) -> None:
    """Assert that ``seen`` is all of the work: each token once, and the counters of the store."""
    tokens: dict[tuple[Sequence, int], bool] = {}
    for watched in seen:
        chosen = choices(watched)
        assert chosen.shape[1:] == (sum(watched.parts.values()), K)
        distinct = [set(layer.ravel().tolist()) for layer in chosen]
        assert watched.store.requests == sum(map(len, distinct))
        assert watched.store.misses == sum(len(experts) for _, experts in watched.misses)
        for layer, experts in watched.misses:
            assert set(experts) <= distinct[layer]
        assert 0 < sum(watched.phases.values()) <= watched.seconds
        for sequence, count in watched.parts.items():
            first = watched.positions[sequence]
            for position in range(first, first + count):
                assert (sequence, position) not in tokens
                tokens[sequence, position] = watched.decoding
    assert tokens == {
        (sequence, position): position >= len(sequence.request.prompt_ids)
        for sequence in sequences
        for position in range(len(sequence.request.prompt_ids) + len(sequence.token_ids) - 1)
    }
    counted = sum((watched.store for watched in seen), StoreStats())
    for name in ("fetches", "requests", "hits", "misses", "reads", "bytes_read"):
        assert getattr(counted, name) == getattr(total, name), name


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"slots": 8}, id="pread"),
        pytest.param({"backend": "ram_hybrid", "budget_gib": HALF, "slots": 8}, id="hits-and-misses"),
        pytest.param({"backend": "ram_hybrid", "budget_gib": HALF, "prefetch": "next_router"}, id="prefetch"),
    ],
)
def test_a_watcher_sees_every_token(options: dict[str, Any], tiny_pack: Path) -> None:
    with flashmoe_mlx.load(tiny_pack, prompt_cache_gib=0, **options) as engine:
        expected = [sequence.token_ids for sequence in answer(engine)]
        seen: list[WatchedPass] = []
        before = engine.store.stats()
        engine.watch(seen.append)
        sequences = answer(engine)
        engine.watch(None)
        assert [sequence.token_ids for sequence in sequences] == expected
        assert_complete(seen, sequences, engine.store.stats() - before)
        answer(engine)
        assert engine.store.on_misses is None
    assert {watched.decoding for watched in seen} == {False, True}


@needs_linux
def test_steps_ahead_are_watched_without_waiting(tiny_pack: Path) -> None:
    with gpu_on_cpu.metal(mx.float32), flashmoe_mlx.load(tiny_pack, "resident", prompt_cache_gib=0) as engine:
        expected = answer(engine, PROMPTS[:1])[0].token_ids
        seen: list[WatchedPass] = []
        waits = []
        for watcher in (None, seen.append):
            engine.watch(watcher)
            before, waited = engine.store.stats(), engine.runner.clock.waits
            sequences = answer(engine, PROMPTS[:1])
            waits.append(engine.runner.clock.waits - waited)
        assert sequences[0].token_ids == expected
        assert waits[0] == waits[1]
        assert engine.runner.ahead.ready
        assert_complete(seen, sequences, engine.store.stats() - before)


def test_an_observer_and_a_watcher_see_the_same(tiny_pack: Path) -> None:
    with flashmoe_mlx.load(tiny_pack, slots=8, prompt_cache_gib=0) as engine:
        observed: list[npt.NDArray[np.uint32]] = []
        seen: list[WatchedPass] = []
        engine.observe_routing(lambda _, experts: observed.append(experts))
        engine.watch(seen.append)
        answer(engine)
    np.testing.assert_array_equal(
        np.concatenate([chosen.ravel() for chosen in observed]),
        np.concatenate([experts.ravel() for watched in seen for _, experts in watched.choices]),
    )


def test_a_failed_pass_is_not_reported(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with flashmoe_mlx.load(tiny_pack, slots=8) as engine:
        seen: list[WatchedPass] = []
        engine.watch(seen.append)
        monkeypatch.setattr(type(engine.store), "_load", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer(engine)
        assert not seen
        assert engine.store.on_misses is None
