"""Every record reaches its slot, for every kind of memory and every sequence of fillings."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_slots_on_cpu
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmoe_mlx
from flashmoe_mlx.backends import ram_hybrid, resident
from flashmoe_mlx.backends.pread import PreadStore
from flashmoe_mlx.backends.ram_hybrid import RamHybridStore
from flashmoe_mlx.backends.resident import ResidentStore
from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.stores import host_slots, memory
from flashmoe_mlx.stores.gpu_slots import GpuSlots
from flashmoe_mlx.stores.host_slots import CopyBuffer, HostSlots
from flashmoe_mlx.stores.slab import Slab
from flashmoe_mlx.stores.slots import MemoryKind, SlotMaker, choose_memory_kind, slots_for
from flashmoe_mlx.testing.store_tests import check
from flashmoe_mlx.testing.stored_experts import EXPERTS, LAYERS, StoredExperts, write_experts

COUNT, RECORD, AT_ONCE = 6, 16384, 4


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredExperts:
    return write_experts(tmp_path_factory.mktemp("experts"), bits=4, contiguous=True)


def use_memory_kind(kind: MemoryKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stores that are opened later keep their slots in memory of ``kind``."""
    if kind is MemoryKind.GPU:
        gpu_slots_on_cpu.emulate(monkeypatch)
    else:
        monkeypatch.setattr(native, "extension", lambda: object() if kind is MemoryKind.HOST else None)
        monkeypatch.setattr(mx.metal, "is_available", lambda: False)


@pytest.fixture(params=MemoryKind, ids=lambda kind: kind.name)
def memory_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    use_memory_kind(request.param, monkeypatch)
    return request.param


@pytest.fixture
def maker(memory_kind: MemoryKind) -> SlotMaker:
    made = SlotMaker(RECORD, AT_ONCE)
    assert made.kind is memory_kind
    return made


def record(number: int) -> bytes:
    return np.random.default_rng(number).bytes(RECORD)


def contents(slots: Any, which: list[int]) -> list[bytes]:
    """Return the records in slots; assert that arrays and the CPU have the same bytes."""
    batch = slots.batch(which)
    host = [bytes(view) for view in batch.host]
    assert [np.array(array).tobytes() for array in batch.records] == host
    assert [np.array(batch.slab[slot]).tobytes() for slot in batch.slots] == host
    return host


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0], [5, 1, 3, 0], [4]])
def test_records_go_to_their_slots_in_any_order(maker: SlotMaker, order: list[int]) -> None:
    slots = maker.make(COUNT)
    filling = slots.fill(order)
    for slot in sorted(order):  # not the order of the request
        filling.rows[slot][:] = record(slot)
    filling.commit()
    assert contents(slots, order) == [record(slot) for slot in order]


def test_a_repeated_slot_is_refused(maker: SlotMaker) -> None:
    with pytest.raises(ValueError, match="twice"):
        maker.make(COUNT).fill([1, 2, 1])


def test_a_second_commit_is_refused(maker: SlotMaker) -> None:
    slots = maker.make(COUNT)
    filling = slots.fill([1])
    filling.commit()
    with pytest.raises(RuntimeError, match="already committed"):
        filling.commit()


def test_a_filling_without_slots(maker: SlotMaker) -> None:
    slots = maker.make(COUNT)
    filling = slots.fill([])
    assert filling.rows == {}
    filling.commit()
    assert contents(slots, []) == []


def test_a_filling_has_only_the_rows_of_its_slots(maker: SlotMaker) -> None:
    filling = maker.make(COUNT).fill([3])
    with pytest.raises(KeyError):
        filling.rows[0]


@pytest.mark.parametrize("kind", [Slab, HostSlots])
def test_records_move_from_other_memory(maker: SlotMaker, kind: type[Slab | HostSlots]) -> None:
    """A moved record reaches the slot that the call names, not the first slot of the filling."""
    other = HostSlots(3, RECORD, CopyBuffer(RECORD)) if kind is HostSlots else Slab(3, RECORD)
    for place, row in enumerate(other.rows(range(3))):
        row[:] = record(100 + place)
    slots = maker.make(COUNT)
    filling = slots.fill([4, 0, 2])
    filling.move(2, other, 0)
    filling.move(0, other, 2)
    filling.rows[4][:] = record(4)
    filling.commit()
    assert contents(slots, [0, 2, 4]) == [record(102), record(100), record(4)]
    other.rows([0])[0][:] = bytes(RECORD)  # swapped memory now belongs to the other slots
    filling = slots.fill([5])
    filling.rows[5][:] = record(5)
    filling.commit()
    assert contents(slots, [0, 2, 4, 5]) == [record(102), record(100), record(4), record(5)]


def test_one_filling_at_a_time_reaches_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers share the staging area, so a later filling makes an earlier one invalid."""
    gpu_slots_on_cpu.emulate(monkeypatch)
    maker = SlotMaker(RECORD, AT_ONCE)
    first, second = maker.make(COUNT), maker.make(COUNT)
    early = first.fill([1])
    late = second.fill([2])
    with pytest.raises(RuntimeError, match="a later filling"):
        early.commit()
    late.rows[2][:] = record(2)
    late.commit()
    assert contents(second, [2]) == [record(2)]
    with pytest.raises(ValueError, match="5 slots to fill at once, but there is memory for 4"):
        first.fill(range(AT_ONCE + 1))
    late = second.fill([3])  # the refused filling has not ended it
    late.rows[3][:] = record(3)
    late.commit()
    assert contents(second, [3]) == [record(3)]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(MemoryKind),
    steps=st.lists(
        st.tuples(
            st.integers(0, 1),
            st.lists(st.integers(0, COUNT - 1), unique=True, max_size=AT_ONCE),
            st.sampled_from(["commit", "abandon", "move"]),
        ),
        max_size=12,
    ),
)
def test_any_sequence_of_fillings(kind: MemoryKind, steps: list[tuple[int, list[int], str]]) -> None:
    """The slots of two layers agree with two dicts; the slots of an abandoned filling are undefined."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_memory_kind(kind, monkeypatch)
        maker = SlotMaker(RECORD, AT_ONCE)
        layers = [maker.make(COUNT), maker.make(COUNT)]
        spare = HostSlots(COUNT, RECORD, CopyBuffer(RECORD))
        known: list[dict[int, bytes]] = [{}, {}]
        for number, (layer, slots, ending) in enumerate(steps):
            filling = layers[layer].fill(slots)
            for slot in slots:
                known[layer].pop(slot, None)
            for slot in slots if ending != "abandon" else slots[1:]:
                content = bytes([number + 1, slot]) * (RECORD // 2)
                if ending == "move":
                    spare.rows([slot])[0][:] = content
                    filling.move(slot, spare, slot)
                else:
                    filling.rows[slot][:] = content
                if ending != "abandon":
                    known[layer][slot] = content
            if ending != "abandon":
                filling.commit()
            for filled, expected in zip(layers, known, strict=True):
                assert contents(filled, list(expected)) == list(expected.values())


# The choice of memory


@pytest.mark.parametrize(
    ("gpu", "metal", "extension", "host_kernels", "expected"),
    [
        (True, False, True, True, MemoryKind.GPU),
        (True, False, False, None, MemoryKind.GPU),
        (False, True, True, True, MemoryKind.SHARED),
        (False, True, True, None, MemoryKind.SHARED),
        (False, False, True, None, MemoryKind.HOST),
        (False, False, False, None, MemoryKind.SHARED),
        (False, False, True, False, MemoryKind.SHARED),  # kernels=mlx on a machine with CPU kernels
        (False, False, False, True, MemoryKind.HOST),
    ],
)
def test_the_kernels_determine_the_memory(
    gpu: bool,
    metal: bool,
    extension: bool,
    host_kernels: bool | None,
    expected: MemoryKind,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "slots_on_gpu", lambda: gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(native, "extension", lambda: object() if extension else None)
    with slots_for(host_kernels):
        assert choose_memory_kind() is expected
    by_default = MemoryKind.HOST if extension and not metal else MemoryKind.SHARED
    assert choose_memory_kind() is (MemoryKind.GPU if gpu else by_default)


@pytest.mark.skipif(native.extension() is None or mx.metal.is_available(), reason="only one kind of memory")
@pytest.mark.parametrize(("kernels", "kind"), [("auto", HostSlots), ("mlx", Slab), ("reference", Slab)])
def test_an_engine_chooses_the_memory_for_its_kernels(kernels: str, kind: type[Any], tiny_pack: Path) -> None:
    with flashmoe_mlx.load(tiny_pack, "resident", kernels=kernels) as engine:
        assert {type(slots) for slots in engine.store._layers} == {kind}


# Memory


def allocations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the size in bytes of all slots that are made later."""
    made: list[int] = []
    for kind in (Slab, HostSlots, GpuSlots):
        original = kind.__init__

        def init(self: Any, count: int, size: int, *rest: Any, original: Callable[..., None] = original) -> None:
            made.append(count * size)
            original(self, count, size, *rest)

        monkeypatch.setattr(kind, "__init__", init)
    return made


@pytest.mark.parametrize("preload", [False, True])
def test_the_checked_size_is_the_allocated_size(
    memory_kind: MemoryKind, preload: bool, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checked size covers slots, copies for MLX, and prefetches in all layers, all in memory of one kind."""
    on_gpu = memory_kind is MemoryKind.GPU  # where records and prefetches wait in memory of the CPU
    claims: list[int] = []
    monkeypatch.setattr(ram_hybrid, "check_memory", lambda _, nbytes, __: claims.append(nbytes))
    made = allocations(monkeypatch)
    size = stored.source.layout.record_bytes
    with RamHybridStore(stored.source, budget_gib=5 * LAYERS * size / 2**30, slots=3, preload=preload) as store:
        for layer in range(LAYERS):
            store.prefetch(layer, [4, 5, 6])
            check(store.fetch(layer, [4, 5, 6]), layer, [4, 5, 6], stored)
    assert len(claims) == 1
    slots = 5 * LAYERS * size
    assert (sum(made) == slots) == on_gpu
    assert slots <= sum(made) <= claims[0] < sum(made) + 4 * size


def test_the_checked_size_of_a_resident_store(
    memory_kind: MemoryKind, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims: list[int] = []
    monkeypatch.setattr(resident, "check_memory", lambda _, nbytes, __: claims.append(nbytes))
    made = allocations(monkeypatch)
    with ResidentStore(stored.source) as store:
        assert sum(made) <= claims[0]
        for layer in range(LAYERS):
            check(store.fetch(layer, range(EXPERTS)), layer, list(range(EXPERTS)), stored)
    copies = EXPERTS * stored.source.layout.record_bytes if memory_kind is MemoryKind.HOST else 0
    assert sum(made) <= claims[0] + copies  # once for the store, not once for each layer


def test_copies_that_do_not_fit_are_refused(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check MLX would crash."""
    use_memory_kind(MemoryKind.HOST, monkeypatch)
    with ResidentStore(stored.source) as store:
        batch = store.fetch(0, range(EXPERTS))
        monkeypatch.setattr(memory, "available_memory", lambda: 2**18)
        with pytest.raises(InputError) as caught:
            batch.slab  # noqa: B018  # copies
        assert caught.value.code == "not_enough_memory"
        assert str(caught.value).isprintable()
        assert bytes(batch.host[3]) == stored.expected[0, 3]
        monkeypatch.undo()
        check(store.fetch(0, [3]), 0, [3], stored)


def test_kernels_that_read_arrays_cause_no_copies(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    made = allocations(monkeypatch)

    def never(*_: object) -> Slab:
        raise AssertionError("experts were copied")

    monkeypatch.setattr(host_slots.CopyBuffer, "room", never)
    with slots_for(host_kernels=False), ResidentStore(stored.source) as store:
        for layer in range(LAYERS):
            check(store.fetch(layer, [1, 2]), layer, [1, 2], stored)
    assert sum(made) == LAYERS * EXPERTS * stored.source.layout.record_bytes


def test_a_slab_that_hints_replace_is_freed(stored: StoredExperts) -> None:
    with PreadStore(stored.source, slots=4) as store:
        store.fetch(0, [1])
        old = weakref.ref(store._reader._slab)
        store.prefetch(0, [2])
        store.fetch(0, [2])
        assert old() is None
        assert store._reader._slab.count == 8
