"""Every backend passes the tests that any store must pass; most need nothing but their name."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

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

FIVE_A_LAYER = {"budget_gib": 4 * 5 * 32768 / 2**30}


SERVING = frozenset(
    {
        "test_it_is_what_it_says",
        "test_every_record",
        "test_any_number_of_experts_in_any_order",
        "test_the_three_views_are_the_same_bytes",
        "test_duplicates_share_a_slot",
        "test_a_batch_stays_valid_until_the_next_fetch",
        "test_slots_are_refilled_whatever_they_held",
        "test_a_hint_never_changes_results",
    }
)
"""What bytes are served, which is all that the memory of slots can change."""
FILLING = SERVING | {
    "test_short_reads",
    "test_an_error_at_the_nth_read",
    "test_reads_ahead_that_fail_are_met_when_asked_for",
    "test_interrupts_anywhere_neither_hang_nor_spoil",
    "test_any_sequence_of_calls",
}
"""And how reads reach them, which memory and reader change together."""
FILLING_ONCE = FILLING - {"test_an_error_at_the_nth_read"}
"""The same where each expert is nine reads, which ``TestCheckpoint`` lets fail one by one."""


def only(kept: Collection[str]) -> Callable[[type[ExpertStoreTests]], type[ExpertStoreTests]]:
    """Keep only these tests: another class runs all of them through the same code but for what these are about."""

    def reduced(tests: type[ExpertStoreTests]) -> type[ExpertStoreTests]:
        for name in dir(tests):
            if name.startswith("test_") and name not in kept:
                setattr(tests, name, None)
        return tests

    return reduced


class _ThroughTheRing(ExpertStoreTests):
    """Reads that go through io_uring are disturbed where the kernel's answers come in."""

    least = 1
    """Bytes of which a short read brings a multiple."""

    def inject(self, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
        original, count = uring.Ring.run, 0

        def run(ring: uring.Ring, reads: Sequence[uring.RingRead]) -> list[int]:
            nonlocal count
            outcomes = [fault(count + index + 1) for index in range(len(reads))]
            count += len(reads)
            shortened = [
                uring.RingRead(
                    read.file,
                    read.offset,
                    read.view[: max(outcome // self.least * self.least, self.least)],
                    read.buffer,
                )
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


class _Direct(ExpertStoreTests):
    """Reads past the page cache: short ones bring whole pages."""

    def inject(self, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
        def aligned(number: int) -> int | None:
            outcome = fault(number)
            return outcome if outcome is None or outcome < 0 else max(outcome // 4096 * 4096, 4096)

        super().inject(monkeypatch, aligned)


class TestPreadDirect(_Direct):
    backend = "pread"
    options = {"slots": 6, "direct": True}


@only(FILLING_ONCE)
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
    options = FIVE_A_LAYER


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
    contiguous = False


# Slots in other memory


class _ForMlx(ExpertStoreTests):
    """As with ``kernels=mlx``: experts are read as arrays, in place."""

    def open_store(self, stored: StoredExperts) -> ExpertStore:
        with slots_for(host_kernels=False):
            return super().open_store(stored)

    def test_it_is_what_it_says(self, store: ExpertStore) -> None:
        assert isinstance(store.fetch(0, [1]), SlabBatch)


class TestRamHybridForMlx(_ForMlx):
    backend = "ram_hybrid"
    options = FIVE_A_LAYER


@only(SERVING)
class TestResidentForMlx(_ForMlx):
    backend = "resident"


class _ForTheCpu(ExpertStoreTests):
    """As with kernels that read experts where the CPU sees them, whether this machine has got them or not."""

    def open_store(self, stored: StoredExperts) -> ExpertStore:
        with slots_for(host_kernels=True):
            return super().open_store(stored)

    def test_it_is_what_it_says(self, store: ExpertStore) -> None:
        if not mx.metal.is_available():
            assert isinstance(store.fetch(0, [1]), HostBatch)


@only(SERVING)
class TestRamHybridForTheCpu(_ForTheCpu):
    backend = "ram_hybrid"
    options = FIVE_A_LAYER


@only(SERVING)
class TestResidentForTheCpu(_ForTheCpu):
    backend = "resident"


class _AsOnCuda(ExpertStoreTests):
    """All that a store does where its slots are in an NVIDIA GPU, but for the kernel that fills them."""

    @pytest.fixture(autouse=True)
    def emulated(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as monkeypatch:  # one of its own, which no test undoes
            gpu_slots_on_cpu.emulate(monkeypatch)
            yield

    def test_it_is_what_it_says(self, store: ExpertStore) -> None:
        assert isinstance(store.fetch(0, [1]), GpuBatch)


class TestRamHybridAsOnCuda(_AsOnCuda):
    backend = "ram_hybrid"
    options = FIVE_A_LAYER


@only(FILLING)
class TestRamHybridAsOnCudaPreloaded(_AsOnCuda):
    backend = "ram_hybrid"
    options = FIVE_A_LAYER | {"preload": True, "slots": 3, "policy": "s3fifo"}


@only(FILLING)
class TestRamHybridAsOnCudaDirect(_AsOnCuda, _Direct):
    backend = "ram_hybrid"
    options = FIVE_A_LAYER | {"direct": True, "policy": "lfu"}


@needs_io_uring
@only(FILLING)
class TestRamHybridAsOnCudaByUring(_AsOnCuda, _ThroughTheRing):
    backend = "ram_hybrid"
    options = FIVE_A_LAYER | {"reader": "io_uring"}


@needs_io_uring
@only(FILLING)
class TestRamHybridAsOnCudaDirectByUring(_AsOnCuda, _ThroughTheRing):
    backend = "ram_hybrid"
    options = FIVE_A_LAYER | {"reader": "io_uring", "direct": True, "depth": 2}
    least = 4096


@only(FILLING_ONCE)
class TestRamHybridAsOnCudaOnACheckpoint(_AsOnCuda):
    backend = "ram_hybrid"
    options = FIVE_A_LAYER
    contiguous = False


class TestResidentAsOnCuda(_AsOnCuda):
    backend = "resident"


@needs_io_uring
@only(FILLING)
class TestResidentAsOnCudaByUring(_AsOnCuda, _ThroughTheRing):
    backend = "resident"
    options = {"reader": "io_uring", "depth": 3}


@only(SERVING)
class TestPreadAsOnCuda(ExpertStoreTests):
    """Its slots are in memory that the CPU and the GPU share, so it takes no branch of its own."""

    backend = "pread"
    options = {"slots": 6}

    @pytest.fixture(autouse=True)
    def emulated(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            gpu_slots_on_cpu.emulate(monkeypatch)
            yield


@only(SERVING)
class TestMmapAsOnCuda(TestMmap):
    """Copies for the GPU are in such memory, too."""

    @pytest.fixture(autouse=True)
    def emulated(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            gpu_slots_on_cpu.emulate(monkeypatch)
            yield


class TestMmapAsOnMetal(TestMmap):
    """Metal takes the mapping itself for a buffer, if it may be written to."""

    @pytest.fixture(autouse=True)
    def emulated(self) -> Iterator[None]:
        def in_place(array: Any, copy: bool) -> mx.array:
            assert array.flags.writeable or not copy
            assert copy is False
            return mx.array(array)

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(mx.metal, "is_available", lambda: True)
            monkeypatch.setattr(mx, "asarray", in_place)
            yield


@only(SERVING)
class TestMmapAsOnMetalThatTakesNoMapping(TestMmap):
    """Then it is copied."""

    @pytest.fixture(autouse=True)
    def emulated(self) -> Iterator[None]:
        def refuse(*_: object, **__: object) -> mx.array:
            raise ValueError("not such memory")

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(mx.metal, "is_available", lambda: True)
            monkeypatch.setattr(mx, "asarray", refuse)
            yield


@only(SERVING)
class TestRamHybridAsOnMetal(ExpertStoreTests):
    """Metal and the CPU share MLX's memory, whatever the kernels."""

    backend = "ram_hybrid"
    options = FIVE_A_LAYER

    @pytest.fixture(autouse=True)
    def emulated(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(mx.metal, "is_available", lambda: True)
            yield

    def test_it_is_what_it_says(self, store: ExpertStore) -> None:
        assert isinstance(store.fetch(0, [1]), SlabBatch)


@pytest.mark.cuda
class TestRamHybridOnCuda(ExpertStoreTests):
    backend = "ram_hybrid"
    options = FIVE_A_LAYER


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
