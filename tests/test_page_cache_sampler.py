"""Stores tell how much of what they read was in the page cache before."""

import mmap
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import pytest
from systems import needs_linux

from flashmoe_mlx.backends.io_uring import UringStore
from flashmoe_mlx.backends.mmap import MmapStore
from flashmoe_mlx.backends.pread import PreadStore
from flashmoe_mlx.backends.ram_hybrid import RamHybridStore
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores import page_cache, page_cache_sampler
from flashmoe_mlx.stores.contract import ExpertStore, StoreStats
from flashmoe_mlx.stores.page_cache import cached_range, evict
from flashmoe_mlx.stores.page_cache_sampler import PageCacheSampler
from flashmoe_mlx.testing.stored_experts import EXPERTS, StoredExperts, write_experts


@pytest.fixture
def pack(tmp_path: Path) -> StoredExperts:
    """Experts in one piece each, which no process has read yet."""
    return evicted(write_experts(tmp_path, 4, contiguous=True))


def evicted(stored: StoredExperts) -> StoredExperts:
    """Drop the files of ``stored`` from the page cache; skip the test where that is impossible."""
    try:
        evict(stored.paths())
    except FlashMoeError as error:
        pytest.skip(str(error))
    return stored


STORES: dict[str, Callable[[ExpertSource], ExpertStore]] = {
    "pread": lambda source: PreadStore(source, readahead=False),
    "mmap": lambda source: MmapStore(source, advice="random"),
    "ram_hybrid": lambda source: RamHybridStore(source, budget_gib=0.001),
    "io_uring": lambda source: UringStore(source, direct=False),
}


@needs_linux
@pytest.mark.parametrize("backend", STORES)
def test_stores_tell_cold_from_warm_reads(pack: StoredExperts, backend: str) -> None:
    """Every fetch is in the sample here, because the share of the time may be anything."""
    page_bytes = pack.source.layout.record_bytes
    with STORES[backend](pack.source) as store:
        store.fetch(2, [3])
        cold = store.stats()
        assert (cold.sampled_bytes, cold.page_cache_hit_rate) == (page_bytes, 0)
    with STORES[backend](pack.source) as store:
        store.fetch(2, [3])
        warm = store.stats()
        assert (warm.sampled_bytes, warm.page_cache_hit_rate) == (page_bytes, 1)


@needs_linux
def test_pieces_of_a_checkpoint_are_counted_in_whole_pages(tmp_path: Path) -> None:
    stored = evicted(write_experts(tmp_path, 4, contiguous=False))
    sampler = PageCacheSampler(stored.source)
    assert sampler.sample(0, [5]).page_cache_hit_rate == 0
    for path in stored.paths():
        path.read_bytes()
    sampler = PageCacheSampler(stored.source)
    found = sampler.sample(0, [5])
    assert found.page_cache_hit_rate == 1
    assert found.sampled_bytes >= stored.source.layout[0].payload_bytes
    assert found.sampled_bytes % mmap.PAGESIZE == 0


def test_direct_reads_have_no_sample(pack: StoredExperts) -> None:
    with PreadStore(pack.source, direct=True) as store:
        try:
            store.fetch(0, [1])
        except FlashMoeError as error:
            pytest.skip(str(error))
        assert store.stats().page_cache_hit_rate is None


def test_hinted_experts_are_looked_up_before_the_hint_reads_them(pack: StoredExperts) -> None:
    size = pack.source.layout.record_bytes
    with STORES["pread"](pack.source) as store:
        store.prefetch(1, [4])
        with pack.paths()[1].open("rb") as file:
            deadline = monotonic() + 20
            while not cached_range(Path(file.name), file.fileno(), 4 * size, size) and monotonic() < deadline:
                sleep(0.001)
        store.fetch(1, [4])
        stats = store.stats()
    assert stats.prefetched == 1
    assert stats.page_cache_hit_rate == 0


def test_mincore_agrees_with_cachestat(pack: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    path, size = pack.paths()[0], pack.source.layout.record_bytes
    with path.open("rb") as file:
        for expected in (0, size):
            assert cached_range(path, file.fileno(), 0, size) == expected
            with monkeypatch.context() as patch:
                patch.setattr(page_cache, "cachestat", lambda *_: None)
                assert cached_range(path, file.fileno(), 0, size) == expected
            file.read(size)


@needs_linux
def test_files_of_other_users_are_unknown(pack: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    """mincore(2) calls every page of such files cached."""
    monkeypatch.setattr(page_cache, "cachestat", lambda *_: None)
    monkeypatch.setattr(page_cache.os, "geteuid", lambda: -1)
    monkeypatch.setattr(page_cache.os, "access", lambda *_: False)
    sampler = PageCacheSampler(pack.source)
    assert sampler.sample(0, [1]) == StoreStats()
    assert sampler.sample(0, [1]).page_cache_hit_rate is None


def test_a_missing_file_is_left_to_the_read(pack: StoredExperts) -> None:
    for path in pack.paths():
        path.unlink()
    assert PageCacheSampler(pack.source).sample(0, [1]).sampled_bytes == 0


@pytest.mark.parametrize(("cost", "least", "most"), [(1e-9, 1000, 1000), (1e-4, 30, 70), (10.0, 1, 13)])
def test_samples_take_half_a_percent_of_the_time(
    pack: StoredExperts, monkeypatch: pytest.MonkeyPatch, cost: float, least: int, most: int
) -> None:
    """1,000 requests, one each millisecond; a sample costs ``cost`` seconds."""
    now = 0.0
    monkeypatch.setattr(page_cache_sampler, "perf_counter", lambda: now)
    sampler = PageCacheSampler(pack.source)
    samples = 0

    def look_up(layer: int, expert: int) -> StoreStats:
        nonlocal now, samples
        now += cost
        samples += 1
        assert 0 <= expert < EXPERTS
        return StoreStats()

    monkeypatch.setattr(sampler, "_look_up", look_up)
    for _ in range(1000):
        now += 1e-3
        sampler.sample(0, range(EXPERTS))
    assert least <= samples <= most
