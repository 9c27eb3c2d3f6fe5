"""Requests come before guesses: on a slow disk in virtual time, no guess delays a request by more than it saves."""

import time
from typing import Any

import numpy as np
import pytest
from slow_disk import Clock, SlowDisk
from systems import needs_linux

from flashmoe_mlx.backends.io_uring import UringStore
from flashmoe_mlx.backends.pread import PreadStore
from flashmoe_mlx.backends.ram_hybrid import RamHybridStore
from flashmoe_mlx.stores import read_ahead, uring_reader
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.stores.guess_limit import GuessLimit
from flashmoe_mlx.testing.store_tests import EXPERTS, LAYERS, check
from flashmoe_mlx.testing.stored_experts import StoredExperts, write_experts

K = 4
CHUNKS = 8
"""Reads of a guessed record."""
RATE = 1e9


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredExperts:
    return write_experts(tmp_path_factory.mktemp("experts"), bits=4, contiguous=True)


@pytest.fixture
def chunk(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> int:
    """Make a guessed record take eight reads; return their size."""
    size = stored.source.layout.record_bytes // CHUNKS
    monkeypatch.setattr(read_ahead, "_GUESSED_CHUNK", size)
    return size


def opened(kind: str, stored: StoredExperts) -> ExpertStore:
    name, *depth = kind.split()
    if name == "ram_hybrid":
        budget = LAYERS * 6 * stored.source.layout.record_bytes / 2**30
        return RamHybridStore(stored.source, budget_gib=budget, slots=K, reader="io_uring", depth=64)
    return UringStore(stored.source, slots=K, depth=int(depth[0]) if depth else 64, direct=False)


def decoded(store: ExpertStore, clock: Clock, stored: StoredExperts, idle: float, right: float | None) -> float:
    """Return the virtual seconds of 240 requests, each after ``idle`` seconds of computation.

    ``right`` is the probability that a guess before the computation is right; None makes no guess.
    """
    random, guess = np.random.default_rng(1), np.random.default_rng(2)
    for step in range(240):
        experts, others = np.split(random.permutation(EXPERTS), [K])
        if right is not None:
            store.prefetch(step % LAYERS, np.where(guess.random(K) < right, experts, others[:K]).tolist())
        clock.now += idle
        batch = store.fetch(step % LAYERS, experts.tolist())
        if step % 16 == 0:
            check(batch, step % LAYERS, experts.tolist(), stored)
    return clock.now


@needs_linux
@pytest.mark.parametrize("kind", ["io_uring", "io_uring 2", "ram_hybrid"])
@pytest.mark.parametrize("right", [0.0, 0.3, 0.85])
def test_guesses_never_make_a_slow_disk_slower(
    kind: str, right: float, chunk: int, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(idle: float, right: float | None) -> float:
        clock = Clock()
        monkeypatch.setattr(uring_reader, "Ring", SlowDisk(clock, RATE))
        with opened(kind, stored) as store:
            return decoded(store, clock, stored, idle, right)

    for share in (0.02, 0.2, 1.0):  # computation, in units of the time to read all experts of a request
        idle = share * K * CHUNKS * chunk / RATE
        without, with_guesses = seconds(idle, None), seconds(idle, right)
        assert with_guesses <= 1.01 * without
        if right > 0.8 and share >= 0.2 and "2" not in kind:
            assert with_guesses < 0.93 * without  # nor are good guesses without effect


@needs_linux
@pytest.mark.parametrize("kind", ["io_uring", "pread", "ram_hybrid"])
def test_a_request_reads_the_rest_of_a_guess(kind: str, chunk: int, stored: StoredExperts) -> None:
    with PreadStore(stored.source) if kind == "pread" else opened(kind, stored) as store:
        reader: Any = store._reader  # type: ignore[attr-defined]
        reader._limit.learn(0, 3, 3, late=True, bound=True)
        for layer, experts in ((0, [1, 5]), (1, [7, 1]), (2, [1])):
            before = store.stats()
            store.prefetch(layer, [1, 2])
            time.sleep(0.01)
            check(store.fetch(layer, experts), layer, experts, stored)
            done = store.stats() - before
            assert (done.prefetched, done.bytes_wasted) == (1, 0)  # of expert 1; no read is left for expert 2
            assert done.bytes_read == len(experts) * CHUNKS * chunk
        store.prefetch(3, [1, 2])
        time.sleep(0.01)
        store.fetch(3, [2])
        assert store.stats().bytes_wasted == 3 * chunk


@needs_linux
def test_the_next_experts_of_a_prompt_are_no_guesses(
    chunk: int, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hint for the layer of the latest request is read at once, whatever happened to guesses."""
    clock = Clock()
    monkeypatch.setattr(uring_reader, "Ring", SlowDisk(clock, RATE))
    with opened("io_uring", stored) as store:
        store._reader._limit.learn(0, 8, 0, late=True, bound=True)  # type: ignore[attr-defined]
        for layer in range(LAYERS):
            for first in range(0, EXPERTS, K):
                experts = range(first, first + K)
                check(store.fetch(layer, experts), layer, list(experts), stored)
                if first + K < EXPERTS:
                    store.prefetch(layer, range(first + K, first + 2 * K))
                    clock.now += 1.0
        assert store.stats().prefetched == LAYERS * (EXPERTS - K)


def test_the_limit_of_guesses() -> None:
    limit = GuessLimit()
    assert limit.reads > 1000
    limit.learn(right=2, wrong=6, ended=5, late=True, bound=False)
    assert limit.reads == 5  # the reads that had ended
    for _ in range(8):
        limit.learn(right=2, wrong=3, ended=5, late=False, bound=True)
    assert limit.reads == 7
    limit.learn(right=7, wrong=0, ended=1, late=False, bound=False)
    assert limit.reads == 7  # a right guess that has not ended delays nothing
    limit.learn(right=0, wrong=7, ended=0, late=True, bound=True)
    assert limit.reads == 0
    for _ in range(16):
        assert limit.reads == 0
        limit.learn(right=0, wrong=0, ended=0, late=False, bound=True)
    assert limit.reads == 1


def test_wrong_guesses_fade_even_if_they_delay_nothing() -> None:
    limit = GuessLimit()
    for _ in range(400):
        limit.learn(right=0, wrong=limit.reads and min(limit.reads, 28), ended=28, late=False, bound=limit.reads < 28)
    assert limit.reads <= 1
