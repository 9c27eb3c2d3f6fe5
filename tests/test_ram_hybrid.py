"""Tests of the ram_hybrid store beyond the conformance suite: budget, policies, counters, and failed reads."""

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_slots_on_cpu
import numpy as np
import pytest
from pack_oracle import assert_one_line
from systems import needs_io_uring

from flashmoe_mlx.backends import ram_hybrid
from flashmoe_mlx.backends.ram_hybrid import RamHybridStore
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.research.traces.random_traces import zipf_trace
from flashmoe_mlx.stores import memory
from flashmoe_mlx.stores.contract import ExpertReadError, StoreStats
from flashmoe_mlx.stores.policies import POLICIES, make_policy
from flashmoe_mlx.stores.slot_cache import SlotCache
from flashmoe_mlx.testing.leaks import nothing_left_behind
from flashmoe_mlx.testing.store_tests import check
from flashmoe_mlx.testing.stored_experts import EXPERTS, LAYERS, StoredExperts, write_experts

RECORD = 32768


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredExperts:
    return write_experts(tmp_path_factory.mktemp("experts"), bits=4, contiguous=True)


def gib(slots_per_layer: float) -> float:
    return slots_per_layer * LAYERS * RECORD / 2**30


@pytest.mark.parametrize(
    ("slots_per_layer", "capacity"), [(1, 1), (1.99, 1), (2, 2), (5.5, 5), (EXPERTS, EXPERTS), (1000, EXPERTS)]
)
def test_a_budget_in_gib(stored: StoredExperts, slots_per_layer: float, capacity: int) -> None:
    with RamHybridStore(stored.source, budget_gib=gib(slots_per_layer)) as store:
        assert store.slots == capacity
        for expert in [*range(EXPERTS), *range(EXPERTS - capacity, EXPERTS)]:
            check(store.fetch(2, [expert]), 2, [expert], stored)
        stats = store.stats()
        assert (stats.misses, stats.hits) == (EXPERTS, capacity)
        assert stats.evictions == EXPERTS - capacity


def test_a_share_of_free_memory(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram_hybrid, "available_memory", lambda: 40 * RECORD)
    with RamHybridStore(stored.source, memory_share=0.5) as store:
        assert store.slots == 5


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"budget_gib": gib(0.5)}, "budget_too_small"),
        ({"budget_gib": 1e9}, "budget_too_large"),
        ({"policy": "fifo"}, "unknown_policy"),
        ({"policy": "pinned"}, "policy_without_trace"),
        ({"trace": "x"}, "trace_without_policy"),
        ({"policy": "pinned", "trace": "/nowhere"}, "cannot_read_trace"),
        ({"reader": "floppy"}, "unknown_reader"),
    ],
)
def test_invalid_options(stored: StoredExperts, options: dict[str, Any], code: str, tmp_path: Path) -> None:
    with nothing_left_behind(tmp_path), pytest.raises(InputError) as caught:
        RamHybridStore(stored.source, **{"budget_gib": 0.001, **options})
    assert caught.value.code == code
    assert_one_line(caught.value)


def test_a_budget_larger_than_the_memory(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message states the size of the memory, even if the experts would fit."""
    monkeypatch.setattr(memory, "total_memory", lambda: 16 * 2**30)
    with pytest.raises(InputError) as caught:
        RamHybridStore(stored.source, budget_gib=17)
    assert caught.value.code == "budget_too_large"
    assert "16 GiB" in str(caught.value)
    monkeypatch.setattr(memory, "slots_on_gpu", lambda: True)
    monkeypatch.setattr(memory, "free_gpu_memory", lambda: 8 * 2**30)
    with pytest.raises(InputError) as caught:
        RamHybridStore(stored.source, budget_gib=9)
    assert caught.value.code == "budget_too_large"
    assert "8 GiB" in str(caught.value)


def test_a_budget_larger_than_free_memory(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashmoe_mlx.stores.memory.available_memory", lambda: RECORD)
    with pytest.raises(InputError) as caught:
        RamHybridStore(stored.source, budget_gib=1.0)
    assert caught.value.code == "not_enough_memory"
    assert_one_line(caught.value)


def test_layers_do_not_evict_each_other(stored: StoredExperts) -> None:
    """A common pool for all layers would have no hits, because a token needs more experts than the pool holds."""
    with RamHybridStore(stored.source, budget_gib=gib(3)) as store:
        for _ in range(5):
            for layer in range(LAYERS):
                check(store.fetch(layer, [1, 2, 3]), layer, [1, 2, 3], stored)
        assert (store.stats().misses, store.stats().hits) == (3 * LAYERS, 4 * 3 * LAYERS)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_counters_equal_those_of_the_policy(
    policy: str, gpu: bool, stored: StoredExperts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store and a bare cache with the same requests have the same counters."""
    if gpu:
        gpu_slots_on_cpu.emulate(monkeypatch)
    trace = zipf_trace(tokens=60, layers=LAYERS, num_experts=EXPERTS, k=3, exponent=1.0, seed=3)
    trace.save(tmp_path / "trace")
    named = {"trace": str(tmp_path / "trace")} if policy == "pinned" else {}
    hot = [trace.hot_experts(layer) if named else () for layer in range(LAYERS)]
    caches = [SlotCache(5, make_policy(policy, 5, hot[layer])) for layer in range(LAYERS)]
    expected = StoreStats()
    with RamHybridStore(stored.source, budget_gib=gib(5), policy=policy, **named) as store:
        for layer, experts in trace.decode_requests():
            check(store.fetch(layer, experts), layer, list(experts), stored)
            placed = caches[layer].place(experts)
            misses = len(placed.misses)
            expected += StoreStats(hits=len(experts) - misses, misses=misses, evictions=placed.evictions)
        stats = store.stats()
    assert (stats.hits, stats.misses, stats.evictions) == (expected.hits, expected.misses, expected.evictions)
    assert stats.hits > 0
    assert stats.bytes_read == stats.misses * RECORD


def test_pinned_experts_stay(stored: StoredExperts, tmp_path: Path) -> None:
    choices = np.zeros((10, LAYERS, 2), np.uint16)
    choices[:, :, 0], choices[:, :, 1] = 7, 9
    RoutingTrace(choices, EXPERTS, 0, "test", "").save(tmp_path / "trace")
    options = {"budget_gib": gib(4), "policy": "pinned", "trace": str(tmp_path / "trace")}
    with RamHybridStore(stored.source, **options) as store:  # type: ignore[arg-type]
        store.fetch(0, [7, 9])
        for expert in range(EXPERTS):
            store.fetch(0, [expert])
        before = store.stats()
        check(store.fetch(0, [7, 9]), 0, [7, 9], stored)
        assert (store.stats() - before).hits == 2


def test_a_trace_of_another_model(stored: StoredExperts, tmp_path: Path) -> None:
    zipf_trace(tokens=4, layers=2, num_experts=EXPERTS, k=3, exponent=1.0, seed=3).save(tmp_path / "trace")
    with pytest.raises(InputError) as caught:
        RamHybridStore(stored.source, budget_gib=1.0, policy="pinned", trace=str(tmp_path / "trace"))
    assert caught.value.code == "trace_of_another_model"
    assert_one_line(caught.value)


def test_reused_slots_hold_no_old_bytes(stored: StoredExperts) -> None:
    with RamHybridStore(stored.source, budget_gib=gib(2)) as store:
        batch = store.fetch(0, [1, 2])
        memoryview(batch.slab).cast("B")[:] = b"\xff" * batch.slab.nbytes  # type: ignore[arg-type]
        check(store.fetch(0, [3, 4]), 0, [3, 4], stored)
        assert store.stats().evictions == 2


def test_a_failed_read_frees_only_its_slots(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.preadv
    with RamHybridStore(stored.source, budget_gib=gib(4), depth=1) as store:
        check(store.fetch(0, [1, 2, 3]), 0, [1, 2, 3], stored)
        before = store.stats()

        def fail(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if offset == 6 * RECORD:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(ExpertReadError) as caught:
            store.fetch(0, [2, 5, 6])  # 5 takes the free slot, 6 the slot of 1
        assert (caught.value.layer, caught.value.expert) == (0, 6)
        assert store.stats() == before
        monkeypatch.undo()
        check(store.fetch(0, [2, 3, 5, 6]), 0, [2, 3, 5, 6], stored)
        done = store.stats() - before
        assert (done.hits, done.misses, done.evictions) == (2, 2, 0)


def test_an_interrupted_read_is_repeated(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted read must not leave an expert in the cache that did not arrive."""
    with RamHybridStore(stored.source, budget_gib=gib(4)) as store:

        def interrupt(*_: object) -> tuple[int, int]:
            raise KeyboardInterrupt

        monkeypatch.setattr(store._reader, "read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.fetch(1, [1, 2])
        monkeypatch.undo()
        check(store.fetch(1, [1, 2]), 1, [1, 2], stored)
        assert store.stats().misses == 2


@needs_io_uring
def test_misses_read_through_io_uring(stored: StoredExperts) -> None:
    with RamHybridStore(stored.source, budget_gib=gib(4), reader="io_uring", depth=2) as store:
        for layer in range(LAYERS):
            for experts in ([1, 2, 3, 4], [3, 4, 5], [11, 1]):
                check(store.fetch(layer, experts), layer, experts, stored)
        assert store.stats().hits == 2 * LAYERS


def test_preloaded_experts_are_hits(stored: StoredExperts) -> None:
    with RamHybridStore(stored.source, budget_gib=gib(5), slots=3, preload=True) as store:
        assert store.stats() == StoreStats()
        for layer in range(LAYERS):
            for experts in ([0, 1, 4], [2, 3]):
                check(store.fetch(layer, experts), layer, experts, stored)
        stats = store.stats()
        assert (stats.hits, stats.misses, stats.bytes_read) == (5 * LAYERS, 0, 0)
        check(store.fetch(0, [7, 11]), 0, [7, 11], stored)
        assert store.stats().evictions == 2


def test_the_hottest_experts_are_preloaded(stored: StoredExperts, tmp_path: Path) -> None:
    choices = np.zeros((3, LAYERS, 2), np.uint16)
    choices[:, :, 0], choices[:, :, 1] = 7, [[9], [9], [5]]
    RoutingTrace(choices, EXPERTS, 0, "test", "").save(tmp_path / "trace")
    named = {"policy": "pinned", "trace": str(tmp_path / "trace")}
    with RamHybridStore(stored.source, budget_gib=gib(4), preload=True, **named) as store:  # type: ignore[arg-type]
        store.fetch(1, [10, 11])
        assert store.stats().misses == 2
        check(store.fetch(1, [7, 9]), 1, [7, 9], stored)
        assert store.stats().misses == 2


def test_preloading_from_a_failing_disk_leaves_nothing_behind(
    stored: StoredExperts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with nothing_left_behind(tmp_path), pytest.raises(ExpertReadError) as caught:
        RamHybridStore(stored.source, budget_gib=gib(4), preload=True)
    assert caught.value.code == "read_failed"
    assert caught.value.reason == os.strerror(errno.EIO)


@pytest.mark.parametrize("gpu", [False, True])
def test_prefetched_records_swap_memory_with_slots(
    gpu: bool, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefetches swap memory with slots; no prefetch may overwrite a kept expert."""
    if gpu:
        gpu_slots_on_cpu.emulate(monkeypatch)
    with RamHybridStore(stored.source, budget_gib=gib(5), slots=3) as store:
        for number in range(40):
            layer, experts = number % LAYERS, [number % EXPERTS, (5 * number + 1) % EXPERTS]
            store.prefetch(layer, experts)
            if number % 3:
                time.sleep(0.001)
            store.prefetch(layer, [experts[1], (number + 7) % EXPERTS])
            wanted = list(dict.fromkeys([experts[1], (number + 3) % EXPERTS]))
            check(store.fetch(layer, wanted), layer, wanted, stored)
        assert store.stats().prefetched > 0
        before = store.stats()
        for layer in range(LAYERS):
            for expert in [expert for expert in range(EXPERTS) if expert in store._caches[layer]]:
                check(store.fetch(layer, [expert]), layer, [expert], stored)
        assert store.stats().misses == before.misses


def test_prefetched_and_read_records_reach_their_slots(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU all records of a request share the staging area; the hinted experts are first, last, or between."""
    gpu_slots_on_cpu.emulate(monkeypatch)
    for hinted in ([3], [5], [7], [3, 7], [7, 3], [5, 3, 7]):
        with RamHybridStore(stored.source, budget_gib=gib(6)) as store:
            store.fetch(0, [1])
            store.prefetch(0, hinted)
            while not all(job.ended for job in store._reader._hinted.values()):
                time.sleep(0.001)
            check(store.fetch(0, [3, 1, 5, 7]), 0, [3, 1, 5, 7], stored)
            assert store.stats().prefetched == len(hinted)
            check(store.fetch(0, [7, 5, 3, 1]), 0, [7, 5, 3, 1], stored)


def test_a_failed_read_on_a_gpu_does_not_affect_the_next_request(
    stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that arrived before a read failed are never committed."""
    gpu_slots_on_cpu.emulate(monkeypatch)
    original = os.preadv

    def fail(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == 6 * RECORD:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(fd, buffers, offset)

    with RamHybridStore(stored.source, budget_gib=gib(4), depth=1) as store:
        check(store.fetch(0, [1, 2]), 0, [1, 2], stored)
        store.prefetch(0, [4, 6])
        monkeypatch.setattr(os, "preadv", fail)
        for experts in ([5, 6, 2, 4], [5, 11, 2, 6]):
            with pytest.raises(ExpertReadError):
                store.fetch(0, experts)
        monkeypatch.setattr(os, "preadv", original)
        for experts in ([4, 2, 6, 5], [1, 6, 4], [2, 7, 1, 5]):
            check(store.fetch(0, experts), 0, experts, stored)
