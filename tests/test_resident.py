"""Tests of the resident store beyond the conformance suite: it reads everything once or refuses."""

import errno
import os
from pathlib import Path

import pytest
from pack_oracle import assert_one_line

from flashmoe_mlx.backends.resident import ResidentStore
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.stores.contract import ExpertReadError
from flashmoe_mlx.testing.leaks import nothing_left_behind
from flashmoe_mlx.testing.store_tests import check
from flashmoe_mlx.testing.stored_experts import EXPERTS, LAYERS, StoredExperts, write_experts


@pytest.fixture
def stored(tmp_path: Path) -> StoredExperts:
    return write_experts(tmp_path, bits=4, contiguous=True)


def test_files_are_not_needed_after_opening(stored: StoredExperts) -> None:
    with ResidentStore(stored.source) as store:
        for path in stored.paths():
            path.unlink()
        for layer in range(LAYERS):
            check(store.fetch(layer, range(EXPERTS)), layer, list(range(EXPERTS)), stored)
        stats = store.stats()
        assert (stats.hits, stats.misses, stats.reads) == (LAYERS * EXPERTS, 0, LAYERS * EXPERTS)
        assert stats.bytes_read == LAYERS * EXPERTS * stored.source.layout.record_bytes


def test_experts_that_do_not_fit_are_refused(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashmoe_mlx.stores.memory.available_memory", lambda: 2**20)
    with pytest.raises(InputError) as caught:
        ResidentStore(stored.source)
    assert caught.value.code == "not_enough_memory"
    assert_one_line(caught.value)


def test_a_failing_disk_leaves_nothing_behind(
    stored: StoredExperts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with nothing_left_behind(tmp_path), pytest.raises(ExpertReadError) as caught:
        ResidentStore(stored.source)
    assert caught.value.code == "read_failed"
    assert caught.value.reason == os.strerror(errno.EIO)
