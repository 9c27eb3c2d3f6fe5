"""Records on their way to a GPU: the order of copies, refusals of the driver, and the release of memory."""

import ctypes
import gc
import logging
from typing import Any

import gpu_slots_on_cpu
import mlx.core as mx
import numpy as np
import pytest
from gpu_slots_on_cpu import NAN, LateCopies, Memory
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_mlx.backends.mmap import MmapStore
from flashmoe_mlx.backends.pread import PreadStore
from flashmoe_mlx.backends.ram_hybrid import RamHybridStore
from flashmoe_mlx.backends.resident import ResidentStore
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.record import RECORD_ALIGNMENT
from flashmoe_mlx.stores import memory, pinned, read_ahead
from flashmoe_mlx.stores.pinned import Driver, DriverError, PinnedRows
from flashmoe_mlx.stores.slots import SlotMaker
from flashmoe_mlx.testing.store_tests import check
from flashmoe_mlx.testing.stored_experts import LAYERS, StoredExperts, write_experts

COUNT, RECORD, AT_ONCE = 6, 16384, 4
BUDGET = 5 * LAYERS * 32768 / 2**30


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredExperts:
    return write_experts(tmp_path_factory.mktemp("experts"), bits=4, contiguous=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    return gpu_slots_on_cpu.emulate(monkeypatch)


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(RECORD)


# Order


@given(
    st.lists(st.integers(0, COUNT - 1), unique=True, min_size=1, max_size=AT_ONCE).flatmap(
        lambda slots: st.tuples(st.permutations(slots), st.lists(st.sampled_from(slots), unique=True))
    )
)
def test_records_arrive_in_any_order(drawn: tuple[list[int], list[int]]) -> None:
    """Some records are announced, in any order; ``commit`` copies all others."""
    slots, announced = drawn
    with pytest.MonkeyPatch.context() as monkeypatch:
        gpu = gpu_slots_on_cpu.emulate(monkeypatch)
        slots_on_gpu = SlotMaker(RECORD, AT_ONCE).make(COUNT)
        filling = slots_on_gpu.fill(slots)
        for slot in slots:
            filling.rows[slot][:] = content(slot)
        for slot in announced:
            filling.arrived([slot])
        filling.commit()
        assert gpu.begun == len(slots)
        assert [bytes(view) for view in slots_on_gpu.batch(slots).host] == [content(slot) for slot in slots]


def test_a_fetch_does_not_wait_for_copies(gpu: LateCopies, stored: StoredExperts) -> None:
    with PreadStore(stored.source, slots=6, chunk_mib=1 / 128) as store:
        first = store.fetch(0, [4, 1, 7])
        assert (gpu.begun, gpu.waits) == (3, 0)
        check(first, 0, [4, 1, 7], stored)
        second = store.fetch(1, [2, 4])
        assert (gpu.begun, gpu.waits) == (5, 1)
        check(second, 1, [2, 4], stored)


@pytest.mark.parametrize("store", ["pread", "ram_hybrid"])
def test_no_hint_writes_to_memory_that_is_still_copied(
    store: str, gpu: LateCopies, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hints that follow a fetch at once get other memory than its prefetched experts, as many as before."""
    options: dict[str, Any] = {"slots": 4} if store == "pread" else {"slots": 4, "budget_gib": BUDGET}
    kind: Any = PreadStore if store == "pread" else RamHybridStore
    with kind(stored.source, **options) as opened:
        for number in range(24):
            experts = [(number + 3 * place) % 12 for place in range(4)]
            opened.prefetch(number % LAYERS, experts)
            for job in opened._reader._hinted.values():
                job.wait()
            batch = opened.fetch(number % LAYERS, experts)
            opened.prefetch((number + 1) % LAYERS, [(expert + 1) % 12 for expert in experts])
            for job in opened._reader._hinted.values():
                job.wait()
            assert len(opened._reader._hinted) >= (4 if store == "pread" else 1)
            check(batch, number % LAYERS, experts, stored)
        assert opened.stats().prefetched > 24


def test_the_emulation_finds_a_hint_that_writes_too_early(
    gpu: LateCopies, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted mistake: prefetched experts give their memory back when a fetch returns."""
    monkeypatch.setattr(read_ahead.ReadAhead, "_in_use", property(lambda _: (), lambda *_: None), raising=False)
    with PreadStore(stored.source, slots=4) as store:
        store.prefetch(0, [1, 2, 3, 4])
        for job in store._reader._hinted.values():
            job.wait()
        batch = store.fetch(0, [1, 2, 3, 4])
        store.prefetch(1, [5, 6, 7, 8])
        for job in store._reader._hinted.values():
            job.wait()
        with pytest.raises(AssertionError, match="during its copy"):
            batch.slab  # noqa: B018  # the copies end here
        gpu._copies.clear()


def test_the_emulation_finds_memory_that_is_given_out_too_early(
    gpu: LateCopies, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted mistake: a filling does not wait for the copies of the one before."""
    with PreadStore(stored.source, slots=4) as store:
        store.fetch(0, [1, 2])
        monkeypatch.setattr("flashmoe_mlx.stores.staging.StagingArea.wait", lambda _: None)
        with pytest.raises(AssertionError, match="during its copy"):
            store.fetch(1, [3]).slab  # noqa: B018
        monkeypatch.undo()
        gpu._copies.clear()


def test_a_record_is_not_there_before_its_copy(gpu: LateCopies) -> None:
    slots_on_gpu: Any = SlotMaker(RECORD, AT_ONCE).make(COUNT)
    filling = slots_on_gpu.fill([2])
    filling.rows[2][:] = content(2)
    filling.commit()
    assert set(np.array(slots_on_gpu.array[2]).tolist()) == {NAN}
    assert bytes(slots_on_gpu.batch([2]).host[0]) == content(2)


def test_a_filling_that_is_given_up_writes_to_no_slot_later(gpu: LateCopies) -> None:
    slots_on_gpu = SlotMaker(RECORD, AT_ONCE).make(COUNT)
    early = slots_on_gpu.fill([1])
    early.rows[1][:] = content(1)
    early.arrived([1])
    late = slots_on_gpu.fill([1])
    late.rows[1][:] = content(2)
    with pytest.raises(RuntimeError, match="a later filling"):
        early.arrived([1])
    late.commit()
    assert bytes(slots_on_gpu.batch([1]).host[0]) == content(2)


def test_a_full_table_waits_for_its_copies(gpu: LateCopies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashmoe_mlx.stores.staging._MOST_JOBS", 3)
    slots_on_gpu = SlotMaker(RECORD, AT_ONCE).make(COUNT)
    filling = slots_on_gpu.fill([0, 1, 2, 3])
    for slot in range(4):
        filling.rows[slot][:] = content(slot)
    for slot in range(4):
        filling.arrived([slot])
    filling.commit()
    assert gpu.waits == 1
    assert [bytes(view) for view in slots_on_gpu.batch(range(4)).host] == [content(slot) for slot in range(4)]


def test_more_records_at_once_than_the_table_holds(gpu: LateCopies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashmoe_mlx.stores.staging._MOST_JOBS", 3)
    slots_on_gpu = SlotMaker(RECORD, AT_ONCE).make(COUNT)
    filling = slots_on_gpu.fill([5, 1, 2, 3])
    for slot in filling.rows:
        filling.rows[slot][:] = content(slot)
    filling.commit()
    assert [bytes(view) for view in slots_on_gpu.batch([5, 1, 2, 3]).host] == [content(slot) for slot in (5, 1, 2, 3)]


# Failures


class Refusing(Memory):
    """A driver that pins only ``allowed`` ranges."""

    def __init__(self, allowed: int) -> None:
        super().__init__()
        self._allowed = allowed

    def pin(self, address: int, nbytes: int) -> None:
        if len(self.pinned) >= self._allowed:
            raise DriverError("NVIDIA's driver reports error 2 in cuMemHostRegister_v2")
        super().pin(address, nbytes)


@pytest.mark.parametrize("allowed", [0, 1, 2])
@pytest.mark.parametrize("kind", [PreadStore, RamHybridStore])
def test_memory_that_cannot_be_pinned_is_replaced(
    kind: Any, allowed: int, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver refuses the memory for records, the table of copies, or the memory for prefetches."""
    gpu_slots_on_cpu.emulate(monkeypatch, Refusing(allowed))
    options = {} if kind is PreadStore else {"budget_gib": BUDGET}
    with caplog.at_level(logging.WARNING), kind(stored.source, slots=5, **options) as store:
        for layer in range(LAYERS):
            store.prefetch(layer, [4, 5])
            check(store.fetch(layer, [4, 1, 5]), layer, [4, 1, 5], stored)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3 - allowed
    refused = "NVIDIA's driver reports error 2 in cuMemHostRegister_v2; experts reach the GPU through managed memory"
    assert all(message.startswith(refused) for message in messages)


@pytest.mark.parametrize("kind", [PreadStore, MmapStore])
def test_slots_that_do_not_fit_on_a_gpu(
    kind: Any, gpu: LateCopies, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_gpu_memory", lambda: 3 * 32768)
    with pytest.raises(InputError) as caught:
        kind(stored.source, slots=4)
    assert caught.value.code == "not_enough_memory"
    assert str(caught.value).startswith("4 slots: needs ")


@pytest.mark.parametrize(
    ("kind", "options", "most"),
    [(PreadStore, {"slots": 6}, 18), (RamHybridStore, {"budget_gib": BUDGET, "slots": 4}, 12), (ResidentStore, {}, 16)],
)
def test_pinned_memory_is_bounded_and_freed(
    kind: Any, options: dict[str, Any], most: int, gpu: LateCopies, stored: StoredExperts
) -> None:
    opened = kind(stored.source, **options)
    for layer in range(LAYERS):
        opened.prefetch(layer, [4, 5])
        opened.fetch(layer, [4, 1])
    assert 0 < sum(gpu.pinned.values()) <= most * 32768 + RECORD_ALIGNMENT
    opened.close()
    del opened
    gc.collect()
    assert gpu.pinned == {}


# The driver


class Library:
    """NVIDIA's driver, which answers ``status`` to one function and 0 to all others."""

    def __init__(self, fails: str = "", status: int = 0, elsewhere: int = 0) -> None:
        self.calls: list[str] = []
        self._fails, self._status, self._elsewhere = fails, status, elsewhere

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "cuMemHostGetDevicePointer_v2":
                arguments[0]._obj.value = arguments[1].value + self._elsewhere
            return self._status if name == self._fails else 0

        return call


@pytest.fixture
def driver_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the package load the given library as NVIDIA's driver."""

    def use(library: Library) -> Library:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
        made = Driver()
        monkeypatch.setattr(pinned, "driver", lambda: made)
        return library

    return use


def test_the_calls_of_the_driver(driver_with: Any) -> None:
    library = driver_with(Library())
    rows = PinnedRows(2, RECORD)
    (row,) = rows.rows([1])
    assert library.calls[-3:] == ["cuCtxSetCurrent", "cuMemHostRegister_v2", "cuMemHostGetDevicePointer_v2"]
    del rows
    gc.collect()
    row[:] = bytes(RECORD)  # a view keeps the memory
    assert "cuMemHostUnregister" not in library.calls
    del row
    gc.collect()
    assert library.calls[-3:] == ["cuCtxSetCurrent", "cuCtxSynchronize", "cuMemHostUnregister"]


def test_an_interrupt_after_the_pinning(gpu: LateCopies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory must not be unmapped while it is pinned: its address could then never be pinned again."""
    pin = gpu.pin

    def interrupted(address: int, nbytes: int) -> None:
        pin(address, nbytes)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "pin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PinnedRows(2, RECORD)
    gc.collect()
    assert gpu.pinned == {}


def test_memory_with_another_address_on_the_gpu_is_not_used(driver_with: Any, caplog: pytest.LogCaptureFixture) -> None:
    library = driver_with(Library(elsewhere=4096))
    PinnedRows(2, RECORD)
    assert library.calls[-1] == "cuMemHostUnregister"
    assert "another address on the GPU" in caplog.records[0].getMessage()


@pytest.mark.parametrize("function", ["cuInit", "cuDevicePrimaryCtxRetain", "cuMemHostRegister_v2"])
def test_a_driver_that_refuses(
    function: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library(function, 801))
    monkeypatch.setattr(pinned, "driver", Driver)
    PinnedRows(1, RECORD).rows([0])[0][:] = bytes(RECORD)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"NVIDIA's driver reports error 801 in {function}; experts reach the GPU")


def test_no_driver(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(name: str) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(pinned, "driver", Driver)
    PinnedRows(1, RECORD)
    assert "does not load" in caplog.records[0].getMessage()


# Real GPUs


@pytest.mark.cuda
@pytest.mark.parametrize("size", [RECORD, 2**22])
def test_kernels_read_what_was_copied(size: int, device: None, caplog: pytest.LogCaptureFixture) -> None:
    """No wait stands between a copy and the kernel that reads it, and none between that and the next copy."""
    slots_on_gpu = SlotMaker(size, AT_ONCE).make(COUNT)
    assert slots_on_gpu.array is not None
    words = slots_on_gpu.array.view(mx.uint32)
    for number in range(60):
        slots = [number % COUNT, (number + 2) % COUNT]
        filling = slots_on_gpu.fill(slots)
        for slot in slots:
            np.frombuffer(filling.rows[slot], np.uint32)[:] = 1000 * number + slot
        filling.arrived(slots[:1])
        filling.commit()
        sums = [(words[slot].min(), words[slot].max()) for slot in slots]
        found = [[int(extreme.item()) for extreme in pair] for pair in sums]
        assert found == [[1000 * number + slot] * 2 for slot in slots]
    assert not caplog.records
