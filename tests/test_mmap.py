"""Tests of the mmap store beyond the conformance suite: no copies for the CPU, and files that shrink."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pack_oracle import assert_one_line
from systems import needs_linux

from flashmoe_mlx.backends.mmap import MmapStore
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import Extent
from flashmoe_mlx.stores.contract import ExpertReadError
from flashmoe_mlx.stores.slab import Slab
from flashmoe_mlx.testing.store_tests import check
from flashmoe_mlx.testing.stored_experts import StoredExperts, write_experts


@pytest.fixture
def stored(tmp_path: Path) -> StoredExperts:
    return write_experts(tmp_path, bits=4, contiguous=True)


def test_the_cpu_reads_the_mapping(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the file shows in ``host``, and the slab stays unused until MLX needs a copy."""
    copied: list[object] = []
    original = Slab.rows
    monkeypatch.setattr(Slab, "rows", lambda slab, slots: copied.append(slots) or original(slab, slots))
    with MmapStore(stored.source) as store:
        batch = store.fetch(1, [3, 8])
        assert bytes(batch.host[0]) == stored.expected[1, 3]
        with stored.source.extents(1, 3)[0].path.open("r+b") as file:
            file.seek(stored.source.extents(1, 3)[0].offset)
            file.write(b"changed")
        assert bytes(batch.host[0][:7]) == b"changed"
        assert copied == []
        assert np.array(batch.records[0])[:7].tobytes() == b"changed"
        assert len(copied) == 1


def test_the_mapping_cannot_be_written_to(stored: StoredExperts) -> None:
    with MmapStore(stored.source) as store, pytest.raises(TypeError):
        store.fetch(0, [1]).host[0][0] = 1


def test_a_batch_outlives_its_store(stored: StoredExperts) -> None:
    with MmapStore(stored.source) as store:
        batch = store.fetch(2, [5])
    check(batch, 2, [5], stored)


@needs_linux
def test_a_file_truncated_between_the_check_and_the_access(
    stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports it while it loads the pages; an access to them would send SIGBUS."""
    with MmapStore(stored.source) as store:
        check(store.fetch(0, [0]), 0, [0], stored)
        path = stored.source.extents(0, 0)[0].path
        size = path.stat()
        os.truncate(path, 16384)
        with monkeypatch.context() as patch:  # pytest calls fstat as well, so the patch must not outlive the fetch
            patch.setattr(os, "fstat", lambda _: size)
            with pytest.raises(ExpertReadError) as caught:
                store.fetch(0, [7])
        assert caught.value.code == "read_failed"
        assert_one_line(caught.value)
        assert (caught.value.layer, caught.value.expert) == (0, 7)


def test_a_truncated_file_does_not_end_the_process(stored: StoredExperts) -> None:
    """The process survives with and without ``populate``."""
    script = """
import os, sys
from pathlib import Path
from flashmoe_mlx.backends.mmap import MmapStore
from flashmoe_mlx.stores.contract import ExpertReadError
from flashmoe_mlx.testing.stored_experts import write_experts
stored = write_experts(Path(sys.argv[1]), 4, True)
for populate in (True, False):
    with MmapStore(stored.source, populate=populate) as store:
        bytes(store.fetch(0, [11]).host[0])
        os.truncate(stored.paths()[0], 100)
        try:
            bytes(store.fetch(0, [11]).host[0])
        except ExpertReadError as error:
            print(error.code)
    stored = write_experts(Path(sys.argv[1]), 4, True)
"""
    folder = stored.paths()[0].parent
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["file_ends_early", "file_ends_early"]


def test_experts_in_pieces_are_refused(tmp_path: Path) -> None:
    scattered = write_experts(tmp_path, bits=4, contiguous=False)
    with pytest.raises(InputError) as caught:
        MmapStore(scattered.source)
    assert caught.value.code == "not_a_pack"
    assert_one_line(caught.value)


def test_unknown_advice(stored: StoredExperts) -> None:
    with pytest.raises(InputError) as caught:
        MmapStore(stored.source, advice="good")
    assert caught.value.code == "unknown_advice"
    assert_one_line(caught.value)


def test_an_old_kernel_still_serves(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashmoe_mlx.backends import mmap as backend

    monkeypatch.setattr(backend, "MADV_POPULATE_READ", 1000)  # unknown to any kernel
    with MmapStore(stored.source) as store:
        check(store.fetch(0, [7]), 0, [7], stored)


def test_hints_advise_only_mapped_files(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashmoe_mlx.backends import mmap as backend

    hinted: list[Extent] = []
    with MmapStore(stored.source) as store:
        monkeypatch.setattr(backend._Mapping, "advise", lambda _, extent, __: hinted.append(extent))
        store.prefetch(1, [2])
        assert hinted == []
        store.fetch(1, [3])
        hinted.clear()
        store.prefetch(1, [2, 4])
        assert hinted == [stored.source.extents(1, 2)[0], stored.source.extents(1, 4)[0]]
