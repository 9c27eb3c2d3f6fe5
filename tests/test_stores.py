"""Every backend passes the tests that any store must pass; most need nothing but their name."""

import os
from collections.abc import Sequence
from typing import Any

import pytest
from systems import needs_io_uring

from flashmoe_mlx.backends import mmap as mmap_backend
from flashmoe_mlx.storage import uring
from flashmoe_mlx.testing import ExpertStoreTests, Fault


class _ThroughTheRing(ExpertStoreTests):
    """Reads that go through io_uring are disturbed where the kernel's answers come in."""

    least = 1
    """Bytes that a short read brings at least."""

    def inject(self, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
        original, count = uring.Ring.run, 0

        def run(ring: uring.Ring, reads: Sequence[uring.RingRead]) -> list[int]:
            nonlocal count
            outcomes = [fault(count + index + 1) for index in range(len(reads))]
            count += len(reads)
            shortened = [
                uring.RingRead(read.file, read.offset, read.view[: max(outcome, self.least)], read.buffer)
                if outcome is not None and outcome > 0
                else read
                for read, outcome in zip(reads, outcomes, strict=True)
            ]
            results = original(ring, shortened)
            return [
                outcome if outcome is not None and outcome < 0 else result
                for outcome, result in zip(outcomes, results, strict=True)
            ]

        monkeypatch.setattr(uring.Ring, "run", run)


class TestPread(ExpertStoreTests):
    backend = "pread"
    options = {"slots": 6, "threads": 3}


class TestPreadInChunks(ExpertStoreTests):
    backend = "pread"
    options = {"slots": 6, "threads": 2, "chunk_mib": 1 / 128, "readahead": False}


class TestPreadDirect(ExpertStoreTests):
    backend = "pread"
    options = {"slots": 6, "direct": True}

    def inject(self, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
        def aligned(number: int) -> int | None:
            outcome = fault(number)
            return outcome if outcome is None or outcome < 0 else max(outcome // 4096 * 4096, 4096)

        super().inject(monkeypatch, aligned)


class TestPreadOnACheckpoint(ExpertStoreTests):
    backend = "pread"
    options = {"slots": 6}
    in_one_piece = False


class TestCheckpoint(ExpertStoreTests):
    backend = "checkpoint"
    options = {"slots": 6}
    in_one_piece = False


class TestPack2(ExpertStoreTests):
    backend = "pack2"
    options = {"slots": 6}
    bits = 2


class TestResident(ExpertStoreTests):
    backend = "resident"


class TestRamHybrid(ExpertStoreTests):
    backend = "ram_hybrid"
    options = {"budget_gib": 4 * 5 * 32768 / 2**30}


class TestMmap(ExpertStoreTests):
    backend = "mmap"
    options = {"slots": 6}

    def inject(self, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
        original, count = mmap_backend._Mapping.populate, 0

        def populate(mapping: Any, extent: Any) -> None:
            nonlocal count
            count += 1
            outcome = fault(count)
            if outcome is not None and outcome < 0:
                raise OSError(-outcome, os.strerror(-outcome))
            original(mapping, extent)

        monkeypatch.setattr(mmap_backend._Mapping, "populate", populate)


class TestMmapByPageFaults(ExpertStoreTests):
    backend = "mmap"
    options = {"slots": 6, "populate": False, "advice": "random"}

    def inject(self, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
        pytest.skip("page faults are not calls that could fail: a failing disk is a SIGBUS, as the docstring says")


@needs_io_uring
class TestUring(_ThroughTheRing):
    backend = "io_uring"
    options = {"slots": 6, "direct": False, "workers": True}


@needs_io_uring
class TestUringDirect(_ThroughTheRing):
    backend = "io_uring"
    options = {"slots": 6, "registered": True, "chunk_mib": 1 / 128, "depth": 3}
    least = 4096


@needs_io_uring
class TestUringOnACheckpoint(_ThroughTheRing):
    backend = "io_uring"
    options = {"slots": 6, "direct": False}
    in_one_piece = False


@pytest.mark.cuda
class TestRamHybridOnCuda(ExpertStoreTests):
    backend = "ram_hybrid"
    options = {"budget_gib": 4 * 5 * 32768 / 2**30}


@pytest.mark.cuda
class TestResidentOnCuda(ExpertStoreTests):
    backend = "resident"


@pytest.mark.cuda
class TestPreadOnCuda(ExpertStoreTests):
    backend = "pread"
    options = {"slots": 6}


@pytest.mark.cuda
class TestMmapOnCuda(TestMmap):
    pass
