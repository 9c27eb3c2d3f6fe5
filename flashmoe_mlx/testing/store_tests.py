"""The conformance suite: tests that every store must pass.

    from flashmoe_mlx.testing import ExpertStoreTests

    class TestMyStore(ExpertStoreTests):
        backend = {"_target_": "my_package.MyStore"}

The tests write files of experts and compare the served bytes with the written bytes. No test takes the result of one
method of a store as the expected result of another.
"""

import contextlib
import errno
import gc
import operator
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from flashmoe_mlx.stores.contract import (
    ExpertReadError,
    ExpertRequestError,
    ExpertStore,
    StoreClosedError,
    StoreStats,
)
from flashmoe_mlx.stores.delivery import ExpertBatch, LayerInMemory
from flashmoe_mlx.stores.registry import backend_settings, create_store
from flashmoe_mlx.testing.leaks import nothing_left_behind
from flashmoe_mlx.testing.stored_experts import EXPERTS, LAYERS, StoredExperts, write_experts

Fault = Callable[[int], int | None]
"""A function from the number of a read, counted from 1, to its outcome.

None lets the read happen, a negated error number makes it fail, and a positive number limits the bytes that it returns.
The function may sleep.
"""

_Injector = Callable[[Fault], None]


class ExpertStoreTests:
    """The tests of a store. Subclass it and set ``backend``; pytest then collects the tests with yours.

    If the store does not read with ``os.preadv``, also override ``inject``, so that the tests can make its reads fail.
    """

    backend: ClassVar[str | Mapping[str, Any]]
    """The name of a file in ``configs/backend/``, or a mapping with ``_target_`` and options."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Options that differ from the defaults; a fetch should hold at least 3 experts, but not all 12."""
    bits: ClassVar[int | str | Sequence[tuple[int, int, int]]] = 4
    """Width of the experts in bits; one of MLX's float modes; or the widths of gate, up and down in four layers."""
    contiguous: ClassVar[bool] = True
    """Whether each expert is one piece, as in a pack, or nine pieces, as in a quantized checkpoint."""

    def inject(self, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
        """Let ``fault`` determine the outcome of every later read; the count begins at 1 again."""
        original, lock, count = os.preadv, threading.Lock(), 0

        def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            nonlocal count
            with lock:
                count += 1
                number = count
            outcome = fault(number)
            if outcome is None:
                return original(fd, buffers, offset)
            if outcome < 0:
                raise OSError(-outcome, os.strerror(-outcome))
            return original(fd, [buffers[0][:outcome]], offset)

        monkeypatch.setattr(os, "preadv", preadv)

    def open_store(self, stored: StoredExperts) -> ExpertStore:
        """Open the store under test."""
        named = backend_settings(self.backend) if isinstance(self.backend, str) else dict(self.backend)
        named.pop("variant", None)
        return create_store(stored.source, named | dict(self.options))

    @pytest.fixture(scope="class")
    @classmethod
    def stored(cls, tmp_path_factory: pytest.TempPathFactory) -> StoredExperts:
        """Experts on disk that all tests share and none may change."""
        return write_experts(tmp_path_factory.mktemp("experts"), cls.bits, cls.contiguous)

    @pytest.fixture
    def private(self, tmp_path: Path) -> StoredExperts:
        """Experts on disk that a test may damage."""
        return write_experts(tmp_path, self.bits, self.contiguous)

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def freeze_garbage(cls) -> Iterator[None]:
        """Exclude existing objects from the many garbage collections of these tests, which would search all of them."""
        frozen_before = gc.get_freeze_count() > 0
        gc.collect()
        gc.freeze()
        yield
        if not frozen_before:
            gc.unfreeze()

    @pytest.fixture(autouse=True)
    def nothing_leaks(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        """Assert that each test leaves the open descriptors and the threads as they were."""
        with nothing_left_behind(tmp_path_factory.getbasetemp()):
            yield

    @pytest.fixture
    def store(self, stored: StoredExperts, nothing_leaks: None) -> Iterator[ExpertStore]:  # noqa: ARG002  # sets the order of fixtures
        """An open store, closed after the test."""
        with self.open_store(stored) as opened:
            yield opened

    @pytest.fixture
    def injector(self, monkeypatch: pytest.MonkeyPatch) -> _Injector:
        """A function that applies a fault to all later reads of a test."""

        def install(fault: Fault) -> None:
            monkeypatch.undo()
            self.inject(monkeypatch, fault)

        return install

    # Served bytes

    def test_every_record(self, store: ExpertStore, stored: StoredExperts) -> None:
        for layer in range(LAYERS):
            for group in _groups(range(EXPERTS), store.slots):
                check(store.fetch(layer, group), layer, group, stored)

    def test_any_number_of_experts_in_any_order(self, store: ExpertStore, stored: StoredExperts) -> None:
        random = np.random.default_rng(0)
        for number in range(1, min(store.slots, EXPERTS) + 1):
            for _ in range(3):
                experts = random.permutation(EXPERTS)[:number].tolist()
                check(store.fetch(number % LAYERS, experts), number % LAYERS, experts, stored)

    def test_the_three_views_are_the_same_bytes(self, store: ExpertStore, stored: StoredExperts) -> None:
        size, most = stored.source.layout[1].record_bytes, stored.source.layout.record_bytes
        batch = store.fetch(1, [4, 2])
        assert batch.slab.dtype == mx.uint8
        assert size <= batch.slab.shape[1] <= most
        for slot, record, view in zip(batch.slots, batch.records, batch.host, strict=True):
            assert size <= record.size <= most
            assert size <= view.nbytes <= most
            assert view.format == "B"
            assert _bytes(batch.slab[slot])[:size] == _bytes(record)[:size] == bytes(view)[:size]

    def test_duplicates_share_a_slot(self, store: ExpertStore, stored: StoredExperts) -> None:
        experts = [4, 2, 4, 4, 2]
        batch = store.fetch(1, experts)
        check(batch, 1, experts, stored)
        assert len(set(batch.slots)) == 2
        assert store.stats().requests == 2
        check(store.fetch(1, [3] * 50), 1, [3] * 50, stored)

    def test_an_empty_request(self, store: ExpertStore) -> None:
        before = store.stats()
        batch = store.fetch(0, [])
        assert (batch.slots, len(batch.records), len(batch.host)) == ((), 0, 0)
        done = store.stats() - before
        assert (done.fetches, done.requests, done.reads, done.bytes_read) == (1, 0, 0, 0)

    def test_integers_of_any_kind(self, store: ExpertStore, stored: StoredExperts) -> None:
        check(store.fetch(np.int32(1), np.array([3, 4], np.int64)), 1, [3, 4], stored)  # type: ignore[arg-type]
        check(store.fetch(1, [np.uint8(3), 4]), 1, [3, 4], stored)
        check(store.fetch(1, (3, 4)), 1, [3, 4], stored)
        check(store.fetch(1, range(3, 5)), 1, [3, 4], stored)

    @pytest.mark.parametrize("bad", [-1, "end", 2**31, 2**63, -(2**63), np.int64(-1), np.uint64(2**63)])
    def test_indices_out_of_range(self, store: ExpertStore, stored: StoredExperts, bad: Any) -> None:
        before = store.stats()
        for layer, experts, wrong in ((0, [bad], EXPERTS), (0, [1, bad], EXPERTS), (bad, [1], LAYERS)):
            index = wrong if isinstance(bad, str) else operator.index(bad)
            request = (index if layer is bad else layer, [index if expert is bad else expert for expert in experts])
            for method in (store.fetch, store.prefetch):
                with pytest.raises(ExpertRequestError) as caught:
                    method(*request)
                assert caught.value.code == "index_out_of_range"
                assert_one_line(caught.value)
        assert store.stats() == before
        check(store.fetch(0, [1]), 0, [1], stored)

    @pytest.mark.parametrize("bad", [True, False, np.bool_(True), 1.0, np.float32(1), "1", None, [1], 1j, float("nan")])
    def test_indices_that_are_not_integers(self, store: ExpertStore, bad: Any) -> None:
        for layer, experts in ((0, [bad]), (bad, [1])):
            with pytest.raises(ExpertRequestError) as caught:
                store.fetch(layer, experts)
            assert caught.value.code == "index_no_integer"
            assert_one_line(caught.value)

    def test_more_experts_than_slots(self, store: ExpertStore, stored: StoredExperts) -> None:
        most = min(store.slots, EXPERTS)
        if most < EXPERTS:
            with pytest.raises(ExpertRequestError) as caught:
                store.fetch(0, range(most + 1))
            assert caught.value.code == "too_many_experts"
            assert_one_line(caught.value)
        check(store.fetch(0, range(most)), 0, list(range(most)), stored)

    def test_a_batch_stays_valid_until_the_next_fetch(self, store: ExpertStore, stored: StoredExperts) -> None:
        batch = store.fetch(2, [7, 5])
        size = len(stored.expected[2, 7])
        first, second = batch.records[0][:size], batch.slab[batch.slots[1]][:size]
        total = mx.sum(first.astype(mx.int32)) + mx.sum(second.astype(mx.int32))
        store.prefetch(2, [0, 1, 2])
        store.prefetch(0, [7])
        store.stats()
        time.sleep(0.02)
        check(batch, 2, [7, 5], stored)
        assert total.item() == sum(map(sum, (stored.expected[2, 7], stored.expected[2, 5])))

    def test_slots_are_refilled_completely(self, store: ExpertStore, stored: StoredExperts) -> None:
        """Every expert is requested once and must be read; the previous content of the slots is NaN."""
        places = np.random.default_rng(1).permutation(EXPERTS).tolist()
        before = store.stats()
        for group in _groups(places, min(3, store.slots)):
            for layer in range(LAYERS):
                batch = store.fetch(layer, group)
                check(batch, layer, group, stored)
                if (store.stats() - before).hits:
                    pytest.skip("this store never reads again: NaN would change its experts")
                memoryview(batch.slab).cast("B")[:] = b"\xff" * batch.slab.nbytes  # type: ignore[arg-type]

    def test_a_hint_never_changes_results(self, store: ExpertStore, stored: StoredExperts) -> None:
        random = np.random.default_rng(2)
        for _ in range(40):
            layer, hinted = int(random.integers(LAYERS)), int(random.integers(LAYERS))
            experts = random.permutation(EXPERTS)[: min(3, store.slots)].tolist()
            store.prefetch(hinted, random.integers(EXPERTS, size=8).tolist())
            check(store.fetch(layer, experts), layer, experts, stored)
        store.prefetch(0, [])

    def test_hints_change_no_counter_of_requests(self, store: ExpertStore, stored: StoredExperts) -> None:
        """Right and wrong hints leave hits, misses, evictions, and bytes as they are without hints."""
        random = np.random.default_rng(3)
        requests = [(step % LAYERS, random.permutation(EXPERTS)[: min(3, store.slots)].tolist()) for step in range(24)]
        size = len(stored.expected[0, 0])
        with self.open_store(stored) as plain:
            for step, (layer, experts) in enumerate(requests):
                before, plain_before = store.stats(), plain.stats()
                if step % 3:
                    store.prefetch(layer, experts if step % 3 == 1 else [(expert + 1) % EXPERTS for expert in experts])
                    time.sleep(0.002)
                check(store.fetch(layer, experts), layer, experts, stored)
                plain.fetch(layer, experts)
                done, expected = store.stats() - before, plain.stats() - plain_before
                assert (done.hits, done.misses, done.evictions) == (expected.hits, expected.misses, expected.evictions)
                assert done.bytes_read == expected.bytes_read == done.misses * size
                assert 0 <= done.prefetched <= done.misses
                assert done.bytes_wasted >= 0
                if not step % 3:
                    assert done.prefetched == 0
            assert plain.stats().prefetched == plain.stats().bytes_wasted == 0

    # Whole layers

    def test_a_layer_in_memory_stays_there(self, store: ExpertStore, stored: StoredExperts) -> None:
        random = np.random.default_rng(4)
        found: dict[int, LayerInMemory] = {}
        for step in range(60):
            layer, experts = step % LAYERS, random.permutation(EXPERTS)[: min(3, store.slots)].tolist()
            whole = store.in_memory(layer)
            if whole is not None:
                check_whole(whole, layer, stored)
                assert found.setdefault(layer, whole) is whole
            assert layer not in found or whole is not None
            store.prefetch((layer + 1) % LAYERS, random.integers(EXPERTS, size=8).tolist())
            check(store.fetch(layer, experts), layer, experts, stored)
        for layer, whole in found.items():
            check_whole(whole, layer, stored)

    def test_noted_uses_are_hits(self, store: ExpertStore, stored: StoredExperts) -> None:
        before = store.stats()
        store.note_use([0, 2], np.array([[3, 1, 3], [5, 4, 0]], np.uint32))
        store.note_use([1], np.zeros((1, 0), np.uint32))
        store.note_use([], np.zeros((0, 2), np.uint32))
        assert store.stats() - before == StoreStats(fetches=3, requests=5, hits=5)
        check(store.fetch(0, [1, 3]), 0, [1, 3], stored)

    def test_misses_are_reported(self, store: ExpertStore, stored: StoredExperts) -> None:
        """A fetch reports every expert that it did not find in a slot, and counts each as a miss."""
        reported: list[tuple[int, tuple[int, ...]]] = []
        store.on_misses = lambda layer, experts: reported.append((layer, experts))
        for experts in ([1, 3], [3, 5, 3], [5, 1], [5]):
            before, count = store.stats(), len(reported)
            check(store.fetch(2, experts), 2, experts, stored)
            missed = (store.stats() - before).misses
            assert len(reported) - count == (missed > 0)
            if missed:
                layer, found = reported[-1]
                assert layer == 2
                assert len(found) == len(set(found)) == missed
                assert set(found) <= set(experts)

    @pytest.mark.parametrize(("layer", "expert"), [(LAYERS, 0), (-1, 0), (0, EXPERTS), (0, -1)])
    def test_noted_uses_out_of_range(self, store: ExpertStore, layer: int, expert: int) -> None:
        before = store.stats()
        with pytest.raises(ExpertRequestError) as caught:
            store.note_use([layer], np.array([[1, expert]]))
        assert caught.value.code == "index_out_of_range"
        assert store.stats() == before

    @pytest.mark.parametrize("bad", [LAYERS, -1, True, "0"])
    def test_no_such_layer_in_memory(self, store: ExpertStore, bad: Any) -> None:
        with pytest.raises(ExpertRequestError):
            store.in_memory(bad)

    def test_no_layer_in_memory_once_closed(self, stored: StoredExperts) -> None:
        store = self.open_store(stored)
        store.close()
        with pytest.raises(StoreClosedError):
            store.in_memory(0)
        with pytest.raises(StoreClosedError):
            store.note_use([0], np.array([[1]]))

    # Failing storage

    @pytest.mark.parametrize("nbytes", [1000, 4096, 10_000])
    def test_short_reads(self, nbytes: int, stored: StoredExperts, injector: _Injector) -> None:
        reached = threading.Event()

        def short(_: int) -> int:
            reached.set()
            return nbytes

        injector(short)
        with self.open_store(stored) as store:
            check(store.fetch(1, [2, 9]), 1, [2, 9], stored)
            check(store.fetch(3, [9]), 3, [9], stored)
        assert reached.is_set(), "no read of this store was intercepted: override inject()"

    @pytest.mark.parametrize(
        ("error", "always", "last"),
        [
            (errno.EIO, True, None),
            (errno.EIO, False, None),
            # The error number only affects the message, so it is enough to try other numbers at two reads.
            *((error, False, 2) for error in (errno.ESTALE, errno.ENODEV, errno.ENOMEM)),
        ],
    )
    def test_an_error_at_the_nth_read(
        self, error: int, always: bool, last: int | None, stored: StoredExperts, injector: _Injector
    ) -> None:
        """Reads fail for n = 1, 2, 3 and so on until no read fails or n is ``last``.

        The I/O error tests of SQLite do the same.
        """
        requests = [(0, [1, 2]), (2, [3]), (1, [0, 5, 9]), (0, [1, 4])]
        for nth in range(1, 1000):
            hit = threading.Event()

            def fault(number: int, nth: int = nth, hit: threading.Event = hit) -> int | None:
                if number == nth or (always and number > nth):
                    hit.set()
                    return -error
                return None

            injector(fault)
            failures = self._fetch_all(stored, requests, injector)
            assert bool(failures) == hit.is_set()
            for failure in failures:
                self._check_failure(failure, stored)
                assert failure.reason == os.strerror(error)
            if not hit.is_set():
                assert nth > 1, "no read of this store was intercepted: override inject()"
                return
            if nth == last:
                return
        raise AssertionError("four requests took a thousand reads")

    def _fetch_all(
        self, stored: StoredExperts, requests: Sequence[tuple[int, list[int]]], injector: _Injector
    ) -> list[ExpertReadError]:
        """Return the failures of ``requests``; check every success, and check all requests again without faults."""
        failures: list[ExpertReadError] = []
        try:
            opened = self.open_store(stored)
        except ExpertReadError as failure:
            return [failure]
        with opened as store:
            for layer, experts in requests:
                for group in _groups(experts, store.slots):
                    before = store.stats()
                    try:
                        check(store.fetch(layer, group), layer, group, stored)
                    except ExpertReadError as failure:
                        assert (failure.layer, failure.expert in group) == (layer, True)
                        assert store.stats() == before
                        failures.append(failure)
            injector(lambda _: None)
            for layer, experts in requests:
                for group in _groups(experts, store.slots):
                    check(store.fetch(layer, group), layer, group, stored)
        return failures

    def _check_failure(self, failure: ExpertReadError, stored: StoredExperts) -> None:
        assert_one_line(failure)
        where = f"layer {failure.layer} expert {failure.expert}: {failure.path} at byte {failure.offset}: "
        assert where in str(failure)
        extents = stored.source.extents(failure.layer, failure.expert)
        assert any(
            extent.path == failure.path and extent.offset <= failure.offset < extent.offset + extent.nbytes
            for extent in extents
        )

    @pytest.mark.parametrize("always", [False, True], ids=["once", "for ever"])
    def test_failed_prefetches_are_reported_by_the_fetch(
        self, always: bool, stored: StoredExperts, injector: _Injector
    ) -> None:
        """A failed prefetch is reported only by a fetch of that expert."""
        with self.open_store(stored) as store:
            injector(lambda number: -errno.EIO if always or number == 1 else None)
            store.prefetch(1, [2, 9])
            time.sleep(0.02)
            try:
                check(store.fetch(1, [2, 9]), 1, [2, 9], stored)
            except ExpertReadError as failure:
                self._check_failure(failure, stored)
            store.prefetch(2, [0])
            time.sleep(0.02)
            injector(lambda _: None)
            check(store.fetch(1, [2, 9]), 1, [2, 9], stored)
            check(store.fetch(2, [0, 4]), 2, [0, 4], stored)

    def test_a_close_during_prefetches(self, stored: StoredExperts, injector: _Injector) -> None:
        store = self.open_store(stored)
        injector(lambda _: time.sleep(0.01))
        for layer in range(LAYERS):
            store.prefetch(layer, range(EXPERTS))
        store.close()
        assert store.stats().prefetched == 0

    # Delivery in parts

    def test_each_expert_is_delivered_once(self, store: ExpertStore, stored: StoredExperts) -> None:
        """Slots hold other experts before, so that a record that is delivered too early is noticed."""
        for layer, before, experts in ((0, [9, 10, 11], [1, 2, 3]), (0, [], [3, 1]), (1, [4], [5, 4, 4]), (2, [], [])):
            if before:
                check(store.fetch(layer, before), layer, before, stored)
            check(fetch_in_parts(store, layer, experts, stored), layer, experts, stored)

    def test_a_hinted_expert_that_arrives_before_the_fetch(self, store: ExpertStore, stored: StoredExperts) -> None:
        for layer in range(LAYERS):
            store.prefetch(layer, [6, 2])
            time.sleep(0.01 * (layer % 2))
            check(fetch_in_parts(store, layer, [2, 6, 7], stored), layer, [2, 6, 7], stored)

    def test_the_time_of_the_receiver_is_not_time_of_the_fetch(self, store: ExpertStore) -> None:
        before, start = store.stats(), time.perf_counter()
        store.fetch(3, [1, 5], lambda *_: time.sleep(0.02))
        passed, done = time.perf_counter() - start, store.stats() - before
        assert done.fetch_seconds <= passed - 0.02
        assert 0 <= done.overlapped_seconds <= passed - done.fetch_seconds

    def test_a_failed_read_after_a_delivery(self, stored: StoredExperts, injector: _Injector) -> None:
        with self.open_store(stored) as store:
            for number in (1, 2, 3):
                injector(lambda read, number=number: -errno.EIO if read == number else None)  # type: ignore[misc]
                with contextlib.suppress(ExpertReadError):
                    check(fetch_in_parts(store, number, [1, 2, 3], stored), number, [1, 2, 3], stored)
                injector(lambda _: None)
                check(fetch_in_parts(store, number, [3, 2, 8], stored), number, [3, 2, 8], stored)

    def test_a_receiver_that_fails_or_is_interrupted(self, store: ExpertStore, stored: StoredExperts) -> None:
        """The fetch raises its error, is not counted, and leaves no read behind that writes to a slot."""
        for error in (ZeroDivisionError, KeyboardInterrupt):
            for call in (1, 2):
                calls = 0

                def fail(_: object, __: object, error: type[BaseException] = error, call: int = call) -> None:
                    nonlocal calls
                    calls += 1
                    if calls == call:
                        raise error

                before = store.stats().fetches
                with contextlib.suppress(error):
                    store.fetch(call, [1, 2, 3], fail)
                    assert calls < call
                assert store.stats().fetches - before == (calls < call)
                check(store.fetch(call, [7, 8, 9]), call, [7, 8, 9], stored)
                check(fetch_in_parts(store, call, [1, 2, 3], stored), call, [1, 2, 3], stored)

    def test_a_receiver_that_calls_the_store(self, store: ExpertStore, stored: StoredExperts) -> None:
        """An error, where a store would wait for itself."""
        calls: list[Callable[[], object]] = [
            lambda: store.fetch(0, [1]),
            lambda: store.prefetch(0, [1]),
            lambda: store.in_memory(0),
            store.close,
        ]
        for call in calls:
            with pytest.raises(ExpertRequestError) as caught:
                store.fetch(1, [1, 2], lambda _, __, call=call: call())  # type: ignore[misc]
            assert caught.value.code == "call_during_fetch"
            assert_one_line(caught.value)
        check(store.fetch(1, [1, 2]), 1, [1, 2], stored)

    # Trouble with files

    def test_files_truncated_while_open(self, private: StoredExperts) -> None:
        """At any length a fetch returns the right bytes or raises a typed error; the process never ends."""
        with self.open_store(private) as store:
            check(store.fetch(0, [1]), 0, [1], private)
            for keep in (0.99, 0.5, 0.1, 0.0):
                for path in private.paths():
                    os.truncate(path, int(path.stat().st_size * keep))
                for layer in range(LAYERS):
                    for expert in (EXPERTS - 1, 5, 0):
                        try:
                            check(store.fetch(layer, [expert]), layer, [expert], private)
                        except ExpertReadError as failure:
                            assert failure.code == "file_ends_early"
                            assert_one_line(failure)
                            assert (failure.layer, failure.expert) == (layer, expert)
                            assert failure.offset >= failure.path.stat().st_size
                            self._check_failure(failure, private)

    def test_files_deleted_before_they_are_opened(self, private: StoredExperts) -> None:
        for path in private.paths():
            path.unlink()
        with pytest.raises(ExpertReadError) as caught, self.open_store(private) as store:
            store.fetch(1, [1])
        assert caught.value.code == "no_such_file"
        assert_one_line(caught.value)

    def test_too_few_file_descriptors(self, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(os, "open", refuse)
        try:
            store = self.open_store(stored)
        except ExpertReadError as failure:  # a store that reads when it is opened
            assert failure.code == "too_many_open_files"
            return
        with store:
            with pytest.raises(ExpertReadError) as caught:
                store.fetch(1, [1])
            assert caught.value.code == "too_many_open_files"
            monkeypatch.undo()
            check(store.fetch(1, [1]), 1, [1], stored)

    def test_a_file_replaced_while_open_is_read_as_before(self, private: StoredExperts) -> None:
        with self.open_store(private) as store:
            check(store.fetch(0, [1]), 0, [1], private)
            for path in private.paths():
                new = path.with_suffix(".new")
                new.write_bytes(bytes(path.stat().st_size))
                new.replace(path)
            check(store.fetch(0, [1, 2]), 0, [1, 2], private)

    # Threads, signals, processes

    def test_signals_during_reads(self, store: ExpertStore, stored: StoredExperts) -> None:
        """An interrupted read is repeated, so signals never change the served bytes."""
        received = 0

        def handle(*_: object) -> None:
            nonlocal received
            received += 1

        with _handling(signal.SIGALRM, handle):
            signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
            for step in range(150):
                experts = [step % EXPERTS, (step * 5 + 1) % EXPERTS]
                check(store.fetch(step % LAYERS, experts), step % LAYERS, experts, stored)
        assert received > 0

    def test_interrupts_at_any_point(self, store: ExpertStore, stored: StoredExperts) -> None:
        """Interrupts at many different moments, as from Ctrl-C."""
        for layer in range(LAYERS):
            # Files and threads are opened here: an interrupt could lose a new descriptor before it is stored. A read on
            # demand and a hinted read may open the file of a layer each.
            store.fetch(layer, [0])
            store.prefetch(layer, [1])
            store.fetch(layer, [1])
        interrupted = 0
        with _no_garbage_collection(), _handling(signal.SIGALRM, signal.default_int_handler):
            for step in range(300):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-5 + 2e-6 * (step % 100))
                    for layer in range(LAYERS):
                        if step % 2:
                            store.prefetch(layer, [(step + layer) % EXPERTS, step % EXPERTS])
                        store.fetch(layer, [step % EXPERTS, (step + 3) % EXPERTS])
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
        for layer in range(LAYERS):
            for group in _groups(range(EXPERTS), store.slots):
                check(store.fetch(layer, group), layer, group, stored)
        assert interrupted > 0

    def test_threads_in_turn(self, store: ExpertStore, stored: StoredExperts) -> None:
        lock = threading.Lock()

        def read(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(25):
                layer, experts = int(random.integers(LAYERS)), random.permutation(EXPERTS)[:3].tolist()
                with lock:
                    check_host(store.fetch(layer, experts), layer, experts, stored)

        with ThreadPoolExecutor(4) as readers:
            list(readers.map(read, range(4)))
        assert store.stats().fetches == 100

    def test_threads_at_once_and_a_close(self, stored: StoredExperts) -> None:
        """Simultaneous fetches run one after the other and are all counted; after ``close`` they raise an error."""
        store = self.open_store(stored)
        barrier = threading.Barrier(5)

        def read(seed: int) -> int:
            random = np.random.default_rng(seed)
            barrier.wait()
            for done in range(100_000):
                try:
                    store.fetch(int(random.integers(LAYERS)), random.permutation(EXPERTS)[:3])  # type: ignore[arg-type]
                except StoreClosedError:
                    return done
            return -1

        with ThreadPoolExecutor(4) as readers:
            reading = [readers.submit(read, seed) for seed in range(4)]
            barrier.wait()
            time.sleep(0.1)
            store.close()
            wait(reading)
        done = [future.result() for future in reading]
        assert min(done) >= 0
        assert store.stats().fetches == sum(done) > 0

    def test_close_waits_for_a_fetch_under_way(self, stored: StoredExperts, injector: _Injector) -> None:
        store = self.open_store(stored)
        begun = threading.Event()

        def slow(_: int) -> None:
            begun.set()
            time.sleep(0.05)

        injector(slow)
        with ThreadPoolExecutor(1) as pool:
            fetching = pool.submit(store.fetch, 1, [1, 2, 3])
            while not (begun.is_set() or fetching.done()):
                time.sleep(0.001)
            store.close()
            assert fetching.done()
            assert len(fetching.result().slots) == 3
        with pytest.raises(StoreClosedError):
            store.fetch(1, [1])

    def test_a_second_close_has_no_effect(self, stored: StoredExperts) -> None:
        store = self.open_store(stored)
        store.fetch(0, [0, 1])
        stats = store.stats()
        store.close()
        store.close()
        for experts in ([0], []):
            for method in (store.fetch, store.prefetch):
                with pytest.raises(StoreClosedError) as caught:
                    method(0, experts)
                assert caught.value.code == "store_closed"
                assert_one_line(caught.value)
        assert store.stats() == stats

    def test_an_unclosed_store_leaves_nothing_behind(
        self, stored: StoredExperts, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Descriptors and threads are freed soon after the last reference to the store goes."""
        with nothing_left_behind(tmp_path_factory.getbasetemp()):
            threads = threading.active_count()
            store = self.open_store(stored)
            store.prefetch(1, [3])
            store.fetch(0, [1])
            store.prefetch(1, [4])
            del store
            gc.collect()
            end = time.monotonic() + 10
            while threading.active_count() > threads and time.monotonic() < end:
                time.sleep(0.001)

    def test_the_end_of_a_with_block_closes(self, stored: StoredExperts) -> None:
        with pytest.raises(ZeroDivisionError), self.open_store(stored) as store:
            raise ZeroDivisionError
        with pytest.raises(StoreClosedError):
            store.fetch(0, [0])

    def test_a_forked_process_is_refused(self, store: ExpertStore, stored: StoredExperts) -> None:
        store.fetch(0, [1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer versions of Python warn of forks with threads
            child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                try:
                    store.fetch(0, [1])
                except StoreClosedError as error:
                    store.close()
                    code = 0 if error.code == "store_of_another_process" else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        check(store.fetch(0, [1, 3]), 0, [1, 3], stored)

    # Counting

    def test_counters_add_up(self, store: ExpertStore, stored: StoredExperts) -> None:
        size, opened = len(stored.expected[0, 0]), store.stats()
        assert (opened.fetches, opened.requests, opened.fetch_seconds) == (0, 0, 0.0)
        start = time.perf_counter()
        for layer, experts in ((0, [1, 2, 3]), (0, [1, 1]), (1, [5]), (1, []), (0, [2, 9])):
            before = store.stats()
            store.fetch(layer, experts)
            done = store.stats() - before
            assert (done.fetches, done.requests) == (1, len(set(experts)))
            assert done.hits + done.misses == done.requests
            assert done.evictions <= done.misses
            assert done.bytes_read == done.misses * size
            assert (done.reads > 0) == (done.misses > 0)
            assert 0 <= done.sampled_cached_bytes <= done.sampled_bytes
        stats = store.stats() - opened
        assert (stats.fetches, stats.requests) == (5, 7)
        assert 0 < stats.fetch_seconds <= time.perf_counter() - start
        assert opened + stats == store.stats()

    def test_any_sequence_of_calls(self, stored: StoredExperts) -> None:
        """Random sequences of calls return the bytes of the files."""

        class Machine(_StoreMachine):
            def __init__(machine) -> None:  # noqa: N805  # self is the test
                super().__init__(lambda: self.open_store(stored), stored)

        checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
        few = settings(max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=checks)
        run_state_machine_as_test(Machine, settings=few)


class _StoreMachine(RuleBasedStateMachine):
    """Opens, uses, and closes a store in any order."""

    def __init__(self, opener: Callable[[], ExpertStore], stored: StoredExperts) -> None:
        super().__init__()
        self._opener = opener
        self._stored = stored
        self._open()

    def _open(self) -> None:
        self._store = self._opener()
        self._opened = self._store.stats()
        self._fetches = self._requests = 0
        self._closed = False

    _layers = st.integers(-1, LAYERS)
    _experts = st.lists(st.integers(-1, EXPERTS), max_size=EXPERTS)

    @rule(layer=_layers, experts=_experts, in_parts=st.booleans())
    def fetch(self, layer: int, experts: list[int], in_parts: bool) -> None:
        valid = 0 <= layer < LAYERS and all(0 <= expert < EXPERTS for expert in experts)
        if not valid or len(set(experts)) > self._store.slots:
            with pytest.raises(ExpertRequestError):
                self._store.fetch(layer, experts)
        elif self._closed:
            with pytest.raises(StoreClosedError):
                self._store.fetch(layer, experts)
        else:
            if in_parts:
                batch = fetch_in_parts(self._store, layer, experts, self._stored)
            else:
                batch = self._store.fetch(layer, experts)
            check(batch, layer, experts, self._stored)
            self._fetches += 1
            self._requests += len(set(experts))

    @rule(layer=st.integers(0, LAYERS - 1), experts=st.lists(st.integers(0, EXPERTS - 1)))
    def prefetch(self, layer: int, experts: list[int]) -> None:
        if self._closed:
            with pytest.raises(StoreClosedError):
                self._store.prefetch(layer, experts)
        else:
            self._store.prefetch(layer, experts)

    @rule(layer=st.integers(0, LAYERS - 1), experts=st.lists(st.integers(0, EXPERTS - 1)))
    def use_in_memory(self, layer: int, experts: list[int]) -> None:
        if self._closed:
            with pytest.raises(StoreClosedError):
                self._store.in_memory(layer)
            return
        whole = self._store.in_memory(layer)
        if whole is not None:
            check_whole(whole, layer, self._stored)
            self._store.note_use([layer], np.array([experts], np.int64))
            self._fetches += 1
            self._requests += len(set(experts))

    @rule()
    def count(self) -> None:
        stats = self._store.stats() - self._opened
        assert (stats.fetches, stats.requests) == (self._fetches, self._requests)
        assert stats.hits + stats.misses == stats.requests
        assert stats.evictions <= stats.misses

    @rule()
    def close(self) -> None:
        self._store.close()
        self._closed = True

    @precondition(lambda self: self._closed)
    @rule()
    def open_another(self) -> None:
        self._open()

    def teardown(self) -> None:
        self._store.close()


def check(batch: ExpertBatch, layer: int, experts: Sequence[int], stored: StoredExperts) -> None:
    """Assert that all views of the batch hold ``experts`` of ``layer``.

    Args:
        batch: the served experts.
        layer: the index of the layer.
        experts: the requested experts, in the order of the request.
        stored: the experts on disk, with the expected bytes.
    """
    check_host(batch, layer, experts, stored)
    assert len(batch.records) == len(experts)
    for expert, slot, record in zip(experts, batch.slots, batch.records, strict=True):
        expected = stored.expected[layer, expert]
        assert _bytes(record)[: len(expected)] == expected
        assert _bytes(batch.slab[slot])[: len(expected)] == expected


def fetch_in_parts(store: ExpertStore, layer: int, experts: Sequence[int], stored: StoredExperts) -> ExpertBatch:
    """Fetch, assert that each expert is delivered once and with its bytes, and return the batch."""
    seen: set[int] = set()

    def arrived(part: Sequence[int], batch: ExpertBatch) -> None:
        assert seen.isdisjoint(part)
        seen.update(part)
        check(batch, layer, part, stored)

    batch = store.fetch(layer, experts, arrived)
    assert seen == set(experts)
    return batch


def check_host(batch: ExpertBatch, layer: int, experts: Sequence[int], stored: StoredExperts) -> None:
    """Assert that ``host`` of the batch holds ``experts`` of ``layer``, like ``check``; may run in any thread."""
    assert len(batch.slots) == len(batch.host) == len(experts)
    for expert, view in zip(experts, batch.host, strict=True):
        expected = stored.expected[layer, expert]
        assert bytes(view[: len(expected)]) == expected


def check_whole(whole: LayerInMemory, layer: int, stored: StoredExperts) -> None:
    """Assert that ``whole`` holds all experts of ``layer``."""
    assert (whole.slab.dtype, whole.table.dtype) == (mx.uint8, mx.int32)
    assert whole.table.shape == (EXPERTS,)
    for expert, row in enumerate(np.array(whole.table).tolist()):
        expected = stored.expected[layer, expert]
        assert _bytes(whole.slab[row])[: len(expected)] == expected


def assert_one_line(error: BaseException) -> None:
    """Assert that the message is one printable line."""
    text = str(error)
    assert text
    assert text.isprintable()


def _bytes(array: mx.array) -> bytes:
    return np.array(array).tobytes()


def _groups(experts: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(experts), size):
        yield list(experts[start : start + size])


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection: Hypothesis hooks into it, and an interrupt there would be lost."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def _handling(number: int, handler: Callable[..., object]) -> Iterator[None]:
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(number, previous)
