"""Copies from pinned memory to a GPU: their order, what the driver refuses, and what is freed."""

import ctypes
import gc
import logging
from typing import Any

import gpu_slots_on_cpu
import mlx.core as mx
import numpy as np
import pytest
from gpu_slots_on_cpu import NAN, LateCopies
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_mlx.backends.pread import PreadStore
from flashmoe_mlx.backends.ram_hybrid import RamHybridStore
from flashmoe_mlx.backends.resident import ResidentStore
from flashmoe_mlx.stores import copy_engine as driver
from flashmoe_mlx.stores.copy_engine import CopyEngineError, PinnedRows
from flashmoe_mlx.stores.libc import address_of
from flashmoe_mlx.stores.slots import SlotMaker
from flashmoe_mlx.testing.store_tests import check
from flashmoe_mlx.testing.stored_experts import LAYERS, StoredExperts, write_experts

COUNT, RECORD, AT_ONCE = 6, 16384, 4
BUDGET = 5 * LAYERS * 32768 / 2**30


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredExperts:
    return write_experts(tmp_path_factory.mktemp("experts"), bits=4, contiguous=True)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    return gpu_slots_on_cpu.emulate(monkeypatch)


# Order


@given(st.data())
def test_parts_in_any_order(data: st.DataObject) -> None:
    """Parts may be announced in any order; a record of which a part was not announced is copied as a whole."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        gpu_slots_on_cpu.emulate(monkeypatch)
        slots = SlotMaker(RECORD, AT_ONCE).make(COUNT)
        chosen = data.draw(st.lists(st.integers(0, COUNT - 1), unique=True, min_size=1, max_size=AT_ONCE))
        filling = slots.fill(chosen)
        assert filling.written is not None
        parts = [(slot, part) for slot in chosen for part in range(4)]
        announced = data.draw(st.lists(st.sampled_from(parts), unique=True))
        for slot, part in parts:
            view = filling.rows[slot][part * RECORD // 4 : (part + 1) * RECORD // 4]
            view[:] = bytes([slot, part]) * (RECORD // 8)
        for slot, part in announced:
            filling.written(filling.rows[slot][part * RECORD // 4 : (part + 1) * RECORD // 4])
        filling.commit()
        for slot, view in zip(chosen, slots.batch(chosen).host, strict=True):
            assert bytes(view) == b"".join(bytes([slot, part]) * (RECORD // 8) for part in range(4))


def test_the_emulation_finds_a_record_that_is_read_too_early(engine: LateCopies) -> None:
    slots = SlotMaker(RECORD, AT_ONCE).make(COUNT)
    filling = slots.fill([2])
    assert filling.written is not None
    filling.rows[2][:] = bytes(RECORD)
    filling.written(filling.rows[2])
    assert set(bytes(slots.batch([2]).host[0])) == {NAN}
    filling.commit()
    assert set(bytes(slots.batch([2]).host[0])) == {0}


def test_the_emulation_finds_memory_that_changes_during_its_copy(engine: LateCopies) -> None:
    rows = PinnedRows(1, RECORD, engine)
    target = mx.zeros((RECORD,), mx.uint8)
    mx.eval(target)
    engine.begin_copy(address_of(memoryview(target)), rows.rows([0])[0])  # type: ignore[arg-type]
    rows.rows([0])[0][5] = 0
    with pytest.raises(AssertionError, match="during its copy"):
        engine.wait()


def test_a_filling_that_is_given_up_writes_to_no_slot_later(engine: LateCopies) -> None:
    slots = SlotMaker(RECORD, AT_ONCE).make(COUNT)
    early = slots.fill([1])
    assert early.written is not None
    early.rows[1][:] = bytes(RECORD)
    early.written(early.rows[1])
    late = slots.fill([1])  # waits, because the memory of the earlier filling is written to again
    late.rows[1][:] = bytes([7]) * RECORD
    late.commit()
    assert set(bytes(slots.batch([1]).host[0])) == {7}


def test_one_wait_for_all_records_of_a_fetch(engine: LateCopies, stored: StoredExperts) -> None:
    with PreadStore(stored.source, slots=6, chunk_mib=1 / 128) as store:
        check(store.fetch(0, [4, 1, 7]), 0, [4, 1, 7], stored)
        assert engine.waits == 1
        assert engine.launches["copy_engine"] == 3 * 4


# Failures


def test_a_copy_that_fails_is_an_error_of_the_fetch(
    engine: LateCopies, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(target: int, source: memoryview) -> None:
        raise CopyEngineError("NVIDIA's driver reports error 700 in cuMemcpyHtoDAsync_v2")

    with RamHybridStore(stored.source, budget_gib=BUDGET) as store:
        check(store.fetch(0, [1, 2]), 0, [1, 2], stored)
        monkeypatch.setattr(engine, "begin_copy", refuse)
        with pytest.raises(CopyEngineError) as caught:
            store.fetch(0, [3, 1])
        assert caught.value.code == "gpu_copy_failed"
        monkeypatch.undo()
        check(store.fetch(0, [3, 1]), 0, [3, 1], stored)


@pytest.mark.parametrize("allowed", [0, 1])
def test_memory_that_cannot_be_pinned_is_replaced(
    allowed: int,
    engine: LateCopies,
    stored: StoredExperts,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The limit is reached by the staging area, or by the memory for prefetches."""

    def pin(address: int, nbytes: int) -> None:
        if len(engine.pinned) >= allowed:
            raise CopyEngineError("NVIDIA's driver reports error 2 in cuMemHostRegister_v2")
        LateCopies.pin(engine, address, nbytes)

    monkeypatch.setattr(engine, "pin", pin)
    with caplog.at_level(logging.WARNING), PreadStore(stored.source, slots=6) as store:
        for layer in range(LAYERS):
            store.prefetch(layer, [4, 5])
            check(store.fetch(layer, [4, 1, 5]), layer, [4, 1, 5], stored)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 - allowed
    assert set(messages) == {
        "NVIDIA's driver reports error 2 in cuMemHostRegister_v2; experts reach the GPU through slower memory"
    }


@pytest.mark.parametrize(
    ("store", "options"),
    [(PreadStore, {"slots": 6}), (RamHybridStore, {"budget_gib": BUDGET}), (ResidentStore, {})],
)
def test_pinned_memory_is_bounded_and_freed(
    store: type[Any], options: dict[str, Any], engine: LateCopies, stored: StoredExperts
) -> None:
    opened = store(stored.source, **options)
    for layer in range(LAYERS):
        opened.prefetch(layer, [4, 5])
        opened.fetch(layer, [4, 1])
    most = {PreadStore: 12, RamHybridStore: 10, ResidentStore: 16}[store]
    assert 0 < sum(engine.pinned.values()) <= most * 32768
    opened.close()
    del opened
    gc.collect()
    assert engine.pinned == {}


# The driver


class Library:
    """NVIDIA's driver, which answers ``status`` to one function and 0 to all others."""

    def __init__(self, fails: str = "", status: int = 0) -> None:
        self.calls: list[str] = []
        self._fails, self._status = fails, status

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return self._status if name == self._fails else 0

        return call


def test_the_calls_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    found = driver.copy_engine.__wrapped__()
    assert found is not None
    del library.calls[:]
    rows = PinnedRows(2, RECORD, found)
    (row,) = rows.rows([1])
    del rows
    gc.collect()
    row[:] = bytes(RECORD)  # a view keeps the memory
    found.begin_copy(0, row)
    found.wait()
    assert library.calls == ["cuMemHostRegister_v2", "cuMemcpyHtoDAsync_v2", "cuStreamSynchronize"]
    del row
    gc.collect()
    assert library.calls[-2:] == ["cuStreamSynchronize", "cuMemHostUnregister"]


@pytest.mark.parametrize("function", ["cuInit", "cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuMemHostRegister_v2"])
def test_a_driver_that_refuses(
    function: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library(function, 801))
    assert driver.copy_engine.__wrapped__() is None
    (record,) = caplog.records
    assert record.getMessage() == (
        f"NVIDIA's driver reports error 801 in {function}; experts reach the GPU through managed memory, which is "
        "several times slower"
    )


def test_no_driver(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(name: str) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert driver.copy_engine.__wrapped__() is None
    assert "does not load" in caplog.records[0].getMessage()


@pytest.mark.cuda
def test_copies_reach_a_real_gpu(device: None) -> None:
    slots = SlotMaker(RECORD, AT_ONCE).make(COUNT)
    expected = {}
    for number in range(20):
        chosen = [number % COUNT, (number + 2) % COUNT]
        filling = slots.fill(chosen)
        assert filling.written is not None, "this machine's driver pins no memory"
        for slot in chosen:
            expected[slot] = np.random.default_rng((number, slot)).bytes(RECORD)
            filling.rows[slot][:] = expected[slot]
            filling.written(filling.rows[slot][: RECORD // 2])
            filling.written(filling.rows[slot][RECORD // 2 :])
        filling.commit()
        assert [bytes(view) for view in slots.batch(list(expected)).host] == list(expected.values())
