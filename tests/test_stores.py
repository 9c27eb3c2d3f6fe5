"""Every backend passes the conformance suite, with several options and on emulated machines."""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import gpu_slots_on_cpu
import mlx.core as mx
import pytest
from systems import needs_io_uring

from flashmoe_mlx.backends import mmap as mmap_backend
from flashmoe_mlx.stores import uring
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.stores.gpu_slots import GpuBatch
from flashmoe_mlx.stores.host_slots import HostBatch
from flashmoe_mlx.stores.slab import SlabBatch
from flashmoe_mlx.stores.slots import slots_for
from flashmoe_mlx.testing import ExpertStoreTests, Fault, StoredExperts
from flashmoe_mlx.testing.store_tests import check, check_whole
from flashmoe_mlx.testing.stored_experts import EXPERTS, LAYERS

FIVE_PER_LAYER = {"budget_gib": 4 * 5 * 32768 / 2**30}
"""A budget of five slots in each of four layers."""
ALL_IN_SLOTS = {"budget_gib": 4 * 12 * 32768 / 2**30, "slots": 6}
"""A budget of slots for all experts, six of which are fetched at once."""


SERVING = frozenset(
    {
        "test_the_emulation_takes_effect",
        "test_every_record",
        "test_any_number_of_experts_in_any_order",
        "test_the_three_views_are_the_same_bytes",
        "test_duplicates_share_a_slot",
        "test_a_batch_stays_valid_until_the_next_fetch",
        "test_slots_are_refilled_completely",
        "test_a_hint_never_changes_results",
        "test_a_layer_in_memory_stays_there",
    }
)
"""Tests of the served bytes; no other test depends on the memory of the slots."""
FILLING = SERVING | {
    "test_short_reads",
    "test_an_error_at_the_nth_read",
    "test_failed_prefetches_are_reported_by_the_fetch",
    "test_interrupts_at_any_point",
    "test_any_sequence_of_calls",
}
"""Tests that depend on the memory of the slots and on the reader."""
FILLING_ONCE = FILLING - {"test_an_error_at_the_nth_read"}
"""These tests without the n-th read, which ``TestCheckpoint`` covers for experts in nine pieces."""


def keep_only(kept: Collection[str]) -> Callable[[type[ExpertStoreTests]], type[ExpertStoreTests]]:
    """Drop all other tests from a class, because another class runs them through the same code."""

    def reduced(tests: type[ExpertStoreTests]) -> type[ExpertStoreTests]:
        for name in dir(tests):
            if name.startswith("test_") and name not in kept:
                setattr(tests, name, None)
        return tests

    return reduced


class _ThroughRing(ExpertStoreTests):
    """Tests that inject faults into the answers of the ring."""

    alignment = 1
    """A short read returns a multiple of this number of bytes."""

    def inject(self, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
        original, count = uring.Ring.ended, 0

        def ended(ring: uring.Ring, at_least: int = 0) -> list[tuple[int, int]]:
            nonlocal count
            results = []
            for number, result in original(ring, at_least):
                count += 1
                outcome = fault(count)
                if outcome is not None and outcome > 0:
                    outcome = min(result, max(outcome // self.alignment * self.alignment, self.alignment))
                results.append((number, result if outcome is None else outcome))
            return results

        monkeypatch.setattr(uring.Ring, "ended", ended)


class TestPread(ExpertStoreTests):
    backend = "pread"
    options = {"slots": 6, "threads": 3}


class TestPreadInChunks(ExpertStoreTests):
    backend = "pread"
    options = {"slots": 6, "threads": 2, "chunk_mib": 1 / 128, "readahead": False}


class _Direct(ExpertStoreTests):
    """Reads that bypass the page cache: a short read returns whole pages."""

    def inject(self, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
        def aligned(number: int) -> int | None:
            outcome = fault(number)
            return outcome if outcome is None or outcome < 0 else max(outcome // 4096 * 4096, 4096)

        super().inject(monkeypatch, aligned)


class TestPreadDirect(_Direct):
    backend = "pread"
    options = {"slots": 6, "direct": True}


@keep_only(FILLING_ONCE)
class TestPreadOnACheckpoint(ExpertStoreTests):
    backend = "pread"
    options = {"slots": 6}
    contiguous = False


class TestCheckpoint(ExpertStoreTests):
    backend = "checkpoint"
    options = {"slots": 6}
    contiguous = False


class TestPack2(ExpertStoreTests):
    backend = "pack2"
    options = {"slots": 6}
    bits = 2


class TestResident(ExpertStoreTests):
    backend = "resident"


class TestRamHybrid(ExpertStoreTests):
    backend = "ram_hybrid"
    options = FIVE_PER_LAYER


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
        pytest.skip("a page fault is not a call that can fail: a failing disk sends SIGBUS")


@needs_io_uring
class TestUring(_ThroughRing):
    backend = "io_uring"
    options = {"slots": 6, "direct": False, "workers": True}


@needs_io_uring
class TestUringDirect(_ThroughRing):
    backend = "io_uring"
    options = {"slots": 6, "registered": True, "chunk_mib": 1 / 128, "depth": 3}
    alignment = 4096


@needs_io_uring
class TestUringOnACheckpoint(_ThroughRing):
    backend = "io_uring"
    options = {"slots": 6, "direct": False}
    contiguous = False


# Records of several formats

MIXED = ((8, 8, 8), (2, 2, 2), (2, 3, 8), (4, 4, 6))
"""Widths of gate, up and down in each of four layers, whose records have three sizes."""
FIVE_MIXED = {"budget_gib": 5 * (4 + 1 + 2 + 2) * 16384 / 2**30}
"""A budget of five slots in each of these layers."""


@keep_only(FILLING_ONCE)
class TestMixedPread(ExpertStoreTests):
    backend = "pread"
    options = {"slots": 6}
    bits = MIXED


@keep_only(SERVING)
class TestMixedCheckpoint(ExpertStoreTests):
    backend = "checkpoint"
    options = {"slots": 6}
    contiguous = False
    bits = MIXED


@keep_only(SERVING)
class TestMixedResident(ExpertStoreTests):
    backend = "resident"
    bits = MIXED


@keep_only(FILLING_ONCE)
class TestMixedRamHybrid(ExpertStoreTests):
    backend = "ram_hybrid"
    options = FIVE_MIXED
    bits = MIXED


@keep_only(SERVING)
class TestMixedMmap(ExpertStoreTests):
    backend = "mmap"
    options = {"slots": 6}
    bits = MIXED


@needs_io_uring
@keep_only(SERVING)
class TestMixedUring(_ThroughRing):
    backend = "io_uring"
    options = {"slots": 6, "registered": True, "depth": 3}
    alignment = 4096
    bits = MIXED


@keep_only(SERVING)
class TestMxfp4Pread(ExpertStoreTests):
    backend = "pread"
    options = {"slots": 6}
    bits = "mxfp4"


@keep_only(SERVING)
class TestNvfp4Checkpoint(ExpertStoreTests):
    backend = "checkpoint"
    options = {"slots": 6}
    contiguous = False
    bits = "nvfp4"


@keep_only(SERVING)
class TestMxfp8RamHybrid(ExpertStoreTests):
    backend = "ram_hybrid"
    options = {"budget_gib": 5 * 4 * 4 * 16384 / 2**30}
    bits = "mxfp8"


# Emulated machines


class _Emulated(ExpertStoreTests):
    """The suite inside ``machine``; the type of batches shows that the emulation takes effect."""

    batch_type: ClassVar[type]

    @contextmanager
    def machine(self) -> Iterator[None]:
        """Emulate the machine."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def emulated(self) -> Iterator[None]:
        with self.machine():
            yield

    def test_the_emulation_takes_effect(self, store: ExpertStore) -> None:
        assert isinstance(store.fetch(0, [1]), self.batch_type)


class _ForMlx(_Emulated):
    """``kernels=mlx``, which reads experts as arrays."""

    batch_type = SlabBatch

    @contextmanager
    def machine(self) -> Iterator[None]:
        with slots_for(host_kernels=False):
            yield


class TestRamHybridForMlx(_ForMlx):
    backend = "ram_hybrid"
    options = FIVE_PER_LAYER


@keep_only(SERVING)
class TestResidentForMlx(_ForMlx):
    backend = "resident"


class _ForTheCpu(_Emulated):
    """CPU kernels, which read ``host``, even if this machine has none."""

    batch_type = SlabBatch if mx.metal.is_available() else HostBatch

    @contextmanager
    def machine(self) -> Iterator[None]:
        with slots_for(host_kernels=True):
            yield


@keep_only(SERVING)
class TestRamHybridForTheCpu(_ForTheCpu):
    backend = "ram_hybrid"
    options = FIVE_PER_LAYER


@keep_only(SERVING)
class TestResidentForTheCpu(_ForTheCpu):
    backend = "resident"


class _AsOnCuda(_Emulated):
    """An NVIDIA GPU that holds the slots, and copies records to them as late as it may."""

    batch_type = GpuBatch

    @contextmanager
    def machine(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as monkeypatch:  # no test can undo a separate context
            gpu_slots_on_cpu.emulate(monkeypatch)
            yield


class TestRamHybridAsOnCuda(_AsOnCuda):
    backend = "ram_hybrid"
    options = FIVE_PER_LAYER


@keep_only(FILLING)
class TestRamHybridAsOnCudaPreloaded(_AsOnCuda):
    backend = "ram_hybrid"
    options = FIVE_PER_LAYER | {"preload": True, "slots": 3, "policy": "s3fifo"}


@keep_only(FILLING)
class TestRamHybridAsOnCudaDirect(_AsOnCuda, _Direct):
    backend = "ram_hybrid"
    options = FIVE_PER_LAYER | {"direct": True, "policy": "lfu"}


@needs_io_uring
@keep_only(FILLING)
class TestRamHybridAsOnCudaByUring(_AsOnCuda, _ThroughRing):
    backend = "ram_hybrid"
    options = FIVE_PER_LAYER | {"reader": "io_uring"}


@needs_io_uring
@keep_only(FILLING)
class TestRamHybridAsOnCudaDirectByUring(_AsOnCuda, _ThroughRing):
    backend = "ram_hybrid"
    options = FIVE_PER_LAYER | {"reader": "io_uring", "direct": True, "depth": 2}
    alignment = 4096


@keep_only(FILLING_ONCE)
class TestRamHybridAsOnCudaOnACheckpoint(_AsOnCuda):
    backend = "ram_hybrid"
    options = FIVE_PER_LAYER
    contiguous = False


class TestResidentAsOnCuda(_AsOnCuda):
    backend = "resident"


@needs_io_uring
@keep_only(FILLING)
class TestResidentAsOnCudaByUring(_AsOnCuda, _ThroughRing):
    backend = "resident"
    options = {"reader": "io_uring", "depth": 3}


@keep_only(FILLING)
class TestPreadAsOnCuda(_AsOnCuda):
    """Records arrive in four parts."""

    backend = "pread"
    options = {"slots": 6, "chunk_mib": 1 / 128}


@needs_io_uring
@keep_only(FILLING_ONCE)
class TestUringAsOnCuda(_AsOnCuda, _ThroughRing):
    backend = "io_uring"
    options = {"slots": 6, "direct": False, "chunk_mib": 1 / 128, "depth": 3, "registered": True}


@keep_only(SERVING)
class TestCheckpointAsOnCuda(_AsOnCuda):
    backend = "checkpoint"
    options = {"slots": 6}
    contiguous = False


class TestMmapAsOnCuda(_AsOnCuda, TestMmap):
    """Threads copy records out of the mapping."""


class _AsOnMetal(_Emulated):
    """A Mac, on which the CPU and Metal share the memory of MLX."""

    def asarray(self, array: Any, copy: bool) -> mx.array:
        """Stand in for ``mx.asarray``."""
        assert array.flags.writeable or not copy
        assert copy is False
        return mx.array(array)

    @contextmanager
    def machine(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(mx.metal, "is_available", lambda: True)
            monkeypatch.setattr(mx, "asarray", self.asarray)
            yield


class TestMmapAsOnMetal(_AsOnMetal, TestMmap):
    """Metal makes buffers of the mapping itself if it is writable."""

    batch_type = HostBatch


@keep_only(SERVING)
class TestMmapAsOnMetalThatRefusesTheMapping(_AsOnMetal, TestMmap):
    """Experts are copied if Metal cannot use the mapping."""

    batch_type = HostBatch

    def asarray(self, array: Any, copy: bool) -> mx.array:
        raise ValueError(f"Metal cannot use {array.nbytes} bytes, copy={copy}")


@keep_only(SERVING)
class TestRamHybridAsOnMetal(_AsOnMetal):
    batch_type = SlabBatch
    backend = "ram_hybrid"
    options = FIVE_PER_LAYER


@keep_only(SERVING | {"test_all_layers_come_to_memory"})
class TestRamHybridOfAllExpertsAsOnMetal(_AsOnMetal):
    """Once every expert has been read, a layer is in memory as a whole."""

    batch_type = SlabBatch
    backend = "ram_hybrid"
    options = ALL_IN_SLOTS

    def test_all_layers_come_to_memory(self, store: ExpertStore, stored: StoredExperts) -> None:
        for layer in range(LAYERS):
            assert store.in_memory(layer) is None
            for start in range(0, EXPERTS, store.slots):
                store.fetch(layer, range(start, start + store.slots))
            whole = store.in_memory(layer)
            assert whole is not None
            check_whole(whole, layer, stored)
            before = store.stats()
            check(store.fetch(layer, [5, 1]), layer, [5, 1], stored)
            assert (store.stats() - before).hits == 2


# Real GPUs


@pytest.mark.cuda
class TestRamHybridOnCuda(ExpertStoreTests):
    backend = "ram_hybrid"
    options = FIVE_PER_LAYER


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


@pytest.mark.cuda
@needs_io_uring
class TestUringOnCuda(_ThroughRing):
    backend = "io_uring"
    options = {"slots": 6, "direct": False, "registered": True}
