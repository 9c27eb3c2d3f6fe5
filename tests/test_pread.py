"""The pread store serves the bytes of the files, or an error that says which expert could not be read."""

import contextlib
import errno
import operator
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack_oracle import assert_one_line, layer_bytes, published_parts, read_checkpoint
from tiny_checkpoints import GEOMETRIES, write_checkpoint

from flashmoe_mlx import expert_reader
from flashmoe_mlx.backends.pread import PreadStore
from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.tensors import sort_tensors
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.expert_store import (
    BackendUnavailableError,
    ExpertBatch,
    ExpertReadError,
    ExpertRequestError,
    ExpertSource,
    StoreClosedError,
    StoreStats,
)
from flashmoe_mlx.pack.pack import PackedExperts
from flashmoe_mlx.pack.writer import pack_checkpoint

GEOMETRY = GEOMETRIES["wide"]
LAYERS, EXPERTS = GEOMETRY.num_layers, GEOMETRY.experts
SLOTS = 6

Oracle = dict[tuple[int, int], bytes]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", GEOMETRY, 0, "mlx4", shards=4)


@pytest.fixture(scope="module")
def source(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedExperts:
    return pack_checkpoint(checkpoint, tmp_path_factory.mktemp("pack")).experts["q4"]


@pytest.fixture(scope="module")
def oracle(checkpoint: Path, source: PackedExperts) -> Oracle:
    """Every record, from the checkpoint's tensors."""
    tensors, size = read_checkpoint(checkpoint), source.layout.record_bytes
    layers = [layer_bytes(published_parts(tensors, layer)) for layer in range(LAYERS)]
    return {(n, e): data[e * size : (e + 1) * size] for n, data in enumerate(layers) for e in range(EXPERTS)}


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    files, threads = open_files(), threading.active_count()
    yield
    assert open_files() == files
    assert threading.active_count() == threads


def open_files() -> set[str]:
    found = set()
    for fd in Path("/dev/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists the folder is gone
            found.add(fd.resolve())
    return {str(path) for path in found if path.suffix in (".bin", ".safetensors")}


@pytest.fixture
def store(source: PackedExperts) -> Iterator[PreadStore]:
    with PreadStore(source, slots=SLOTS, threads=3) as opened:
        yield opened


def check(batch: ExpertBatch, layer: int, experts: list[int], oracle: Oracle) -> None:
    """The batch holds the experts, for the CPU and for MLX."""
    assert len(batch.slots) == len(experts)
    host = np.asarray(batch.host)
    for expert, slot in zip(experts, batch.slots, strict=True):
        assert host[slot].tobytes() == oracle[layer, expert]
        assert np.array(batch.slab[slot]).tobytes() == oracle[layer, expert]


def test_every_record(store: PreadStore, source: PackedExperts, oracle: Oracle) -> None:
    for layer in range(LAYERS):
        for first in range(0, EXPERTS, SLOTS):
            experts = list(range(first, min(first + SLOTS, EXPERTS)))
            batch = store.fetch(layer, experts)
            check(batch, layer, experts, oracle)
            assert batch.slab.shape == (SLOTS, source.layout.record_bytes)
            assert batch.slab.dtype == mx.uint8
    size = source.layout.record_bytes
    assert oracle[1, 3] == source.layer_path(1).read_bytes()[3 * size : 4 * size]


def test_slots_are_refilled_in_place(store: PreadStore, oracle: Oracle) -> None:
    first = store.fetch(0, [5, 1])
    before = first.host
    second = store.fetch(2, [7])
    assert second.slab is first.slab
    assert np.asarray(before)[second.slots[0]].tobytes() == oracle[2, 7]
    assert not np.array_equal(np.array(second.slab[0]), np.array(second.slab[1]))


def test_duplicates_share_a_slot(store: PreadStore, oracle: Oracle) -> None:
    experts = [4, 2, 4, 4, 2]
    batch = store.fetch(1, experts)
    check(batch, 1, experts, oracle)
    assert len(set(batch.slots)) == 2
    assert store.stats().requests == 2
    check(store.fetch(1, [3] * 50), 1, [3] * 50, oracle)


def test_an_empty_request(store: PreadStore) -> None:
    assert store.fetch(0, []).slots == ()
    stats = store.stats()
    assert (stats.fetches, stats.requests, stats.reads, stats.bytes_read) == (1, 0, 0, 0)


def test_integers_of_any_kind(store: PreadStore, oracle: Oracle) -> None:
    check(store.fetch(np.int32(1), np.array([3, 4], np.int64)), 1, [3, 4], oracle)  # type: ignore[arg-type]
    check(store.fetch(1, [np.uint8(3), 4]), 1, [3, 4], oracle)
    check(store.fetch(1, (3, 4)), 1, [3, 4], oracle)


@pytest.mark.parametrize("bad", [-1, EXPERTS, 2**31, 2**63, -(2**63), np.int64(-1), np.uint64(2**63)])
def test_indices_out_of_range(store: PreadStore, bad: Any) -> None:
    for layer, experts in ((0, [bad]), (0, [1, bad]), (bad, [1])):
        with pytest.raises(ExpertRequestError, match=f"{operator.index(bad)} is out of range") as caught:
            store.fetch(layer, experts)
        assert_one_line(caught.value)
    assert store.stats() == StoreStats()


@pytest.mark.parametrize("bad", [True, False, np.bool_(True), 1.0, np.float32(1), "1", None, [1], 1j, float("nan")])
def test_indices_that_are_none(store: PreadStore, bad: Any) -> None:
    for layer, experts in ((0, [bad]), (bad, [1])):
        with pytest.raises(ExpertRequestError, match="is not an integer") as caught:
            store.fetch(layer, experts)
        assert_one_line(caught.value)


def test_more_experts_than_slots(store: PreadStore, oracle: Oracle) -> None:
    with pytest.raises(ExpertRequestError, match="7 experts were asked for at once, but the store has 6 slots"):
        store.fetch(0, range(7))
    check(store.fetch(0, range(6)), 0, list(range(6)), oracle)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"slots": 0}, "slots=0"),
        ({"slots": -1}, "slots=-1"),
        ({"threads": 0}, "threads=0"),
        ({"threads": -3}, "thread"),
    ],
)
def test_options_that_make_no_store(source: PackedExperts, options: dict[str, int], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        PreadStore(source, **options)
    assert_one_line(caught.value)


def test_more_slots_than_memory(source: PackedExperts) -> None:
    with pytest.raises(InputError, match=r"slots=1000000000000: .* GB, this machine has") as caught:
        PreadStore(source, slots=10**12)
    assert_one_line(caught.value)


def test_threads_that_do_not_start(source: PackedExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    started = 0

    def failing(self: threading.Thread) -> None:
        nonlocal started
        started += 1
        if started > 2:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(BackendUnavailableError, match="cannot start 5 threads: can't start new thread") as caught:
        PreadStore(source, threads=5)
    assert_one_line(caught.value)


# Faults of the storage


Preadv = Callable[[int, list[memoryview], int], int]


@pytest.fixture
def disturb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, Preadv], Preadv]], None]:
    """Replace ``os.preadv``: the n-th call is made by ``kind(n, original)``."""
    original, lock = os.preadv, threading.Lock()

    def install(kind: Callable[[int, Preadv], Preadv]) -> None:
        count = 0

        def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
            nonlocal count
            with lock:
                count += 1
                call = count
            return kind(call, original)(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)

    return install


def shortened(nbytes: int) -> Callable[[int, Preadv], Preadv]:
    def kind(_: int, read: Preadv) -> Preadv:
        return lambda fd, buffers, offset: read(fd, [buffers[0][:nbytes]], offset)

    return kind


@pytest.mark.parametrize("nbytes", [1000, 8192, 100_000])
def test_short_reads(nbytes: int, store: PreadStore, oracle: Oracle, disturb: Any) -> None:
    disturb(shortened(nbytes))
    check(store.fetch(1, [2, 9]), 1, [2, 9], oracle)
    size = len(oracle[0, 0])
    assert store.stats().reads == 2 * -(-size // nbytes)
    assert store.stats().bytes_read == 2 * size


def test_reads_of_a_byte(store: PreadStore, oracle: Oracle, disturb: Any) -> None:
    disturb(shortened(1))
    check(store.fetch(1, [2]), 1, [2], oracle)
    assert store.stats().reads == len(oracle[0, 0])


def test_signals_during_reads(store: PreadStore, oracle: Oracle) -> None:
    """Python repeats a read that a signal interrupts, and so must a store: no signal may change what is read."""
    received = 0

    def handle(*_: object) -> None:
        nonlocal received
        received += 1

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for step in range(150):
            experts = [step % EXPERTS, (step * 5 + 1) % EXPERTS]
            check(store.fetch(step % LAYERS, experts), step % LAYERS, experts, oracle)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert received > 0


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOMEM, errno.EINVAL])
def test_an_error_at_the_nth_read(
    error: int, always: bool, source: PackedExperts, oracle: Oracle, disturb: Any
) -> None:
    """After it the store is as good as before, and no slot is still being written to."""

    def failing(nth: int) -> Callable[[int, Preadv], Preadv]:
        def kind(call: int, read: Preadv) -> Preadv:
            def fail(*_: object) -> int:
                raise OSError(error, os.strerror(error))

            return fail if call == nth or (always and call > nth) else read

        return kind

    requests = [(0, [1, 2]), (2, [3]), (1, [0, 5, 9])]
    for nth in range(1, 7):
        with PreadStore(source, SLOTS, threads=2) as store:
            disturb(failing(nth))
            failures: list[tuple[ExpertReadError, int, list[int]]] = []
            for layer, experts in requests:
                try:
                    check(store.fetch(layer, experts), layer, experts, oracle)
                except ExpertReadError as caught:
                    failures.append((caught, layer, experts))
            assert len(failures) == 1 or always
            for failure, layer, experts in failures:
                assert_one_line(failure)
                assert (failure.layer, failure.path) == (layer, source.layer_path(layer))
                assert failure.expert in experts
                assert failure.offset == failure.expert * source.layout.record_bytes
                assert f"layer {layer} expert {failure.expert}: " in str(failure)
                assert os.strerror(error) in str(failure)
            disturb(lambda _, read: read)
            check(store.fetch(0, [1, 2, 3]), 0, [1, 2, 3], oracle)


def test_the_end_of_the_file_in_mid_record(checkpoint: Path, oracle: Oracle, tmp_path: Path) -> None:
    source = pack_checkpoint(checkpoint, tmp_path).experts["q4"]
    size = source.layout.record_bytes
    with PreadStore(source, SLOTS) as store:
        for end in (6 * size - 1, 5 * size + 1, 5 * size, 0):
            os.truncate(source.layer_path(3), end)
            with pytest.raises(ExpertReadError, match="the file ends here, in mid-record") as caught:
                store.fetch(3, [5])
            assert_one_line(caught.value)
            assert (caught.value.layer, caught.value.expert) == (3, 5)
            assert caught.value.offset == max(end, 5 * size)
            if end:
                check(store.fetch(3, [4]), 3, [4], oracle)
        check(store.fetch(2, [5]), 2, [5], oracle)


def test_files_that_cannot_be_opened(checkpoint: Path, tmp_path: Path) -> None:
    source = pack_checkpoint(checkpoint, tmp_path).experts["q4"]
    source.layer_path(0).unlink()
    with PreadStore(source) as store:
        with pytest.raises(ExpertReadError, match="No such file"):
            store.fetch(0, [1])
        assert store.fetch(1, [1]).slots == (0,)


def test_too_few_file_descriptors(source: PackedExperts, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with PreadStore(source) as store:
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", refuse)
            with pytest.raises(ExpertReadError, match="Too many open files"):
                store.fetch(1, [1])
        check(store.fetch(1, [1]), 1, [1], oracle)


def test_a_file_replaced_while_open_is_still_the_old_one(checkpoint: Path, oracle: Oracle, tmp_path: Path) -> None:
    source = pack_checkpoint(checkpoint, tmp_path).experts["q4"]
    with PreadStore(source) as store:
        check(store.fetch(0, [1]), 0, [1], oracle)
        (tmp_path / "new").write_bytes(bytes(source.layer_bytes))
        (tmp_path / "new").replace(source.layer_path(0))
        check(store.fetch(0, [1, 2]), 0, [1, 2], oracle)


# Closing, and threads


def test_close_is_final_and_may_be_repeated(source: PackedExperts) -> None:
    store = PreadStore(source)
    store.fetch(0, [0, 1])
    stats = store.stats()
    store.close()
    store.close()
    for experts in ([0], []):
        with pytest.raises(StoreClosedError, match="closed") as caught:
            store.fetch(0, experts)
        assert_one_line(caught.value)
    assert store.stats() == stats


def slowed(seconds: float) -> Callable[[int, Preadv], Preadv]:
    def kind(_: int, read: Preadv) -> Preadv:
        def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
            time.sleep(seconds)
            return read(fd, buffers, offset)

        return slow

    return kind


def test_close_waits_for_a_fetch_under_way(source: PackedExperts, oracle: Oracle, disturb: Any) -> None:
    store = PreadStore(source, SLOTS, threads=1)
    disturb(slowed(0.05))
    with ThreadPoolExecutor(1) as other:
        fetching = other.submit(store.fetch, 1, [1, 2, 3])
        while not store._fetching.locked():
            time.sleep(0.001)
        store.close()
        assert fetching.done()
        check(fetching.result(), 1, [1, 2, 3], oracle)
    with pytest.raises(StoreClosedError):
        store.fetch(1, [1])


def test_many_threads_and_a_close(source: PackedExperts, oracle: Oracle) -> None:
    """Fetches come one after the other, so each thread sees its own experts until the next; then all see the end."""
    store = PreadStore(source, SLOTS, threads=2)
    barrier = threading.Barrier(5)

    def read(seed: int) -> int:
        random = np.random.default_rng(seed)
        barrier.wait()
        for done in range(10_000):
            try:
                store.fetch(int(random.integers(LAYERS)), random.choice(EXPERTS, 3))
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
    assert all(count >= 0 for count in done)
    stats = store.stats()
    assert stats.fetches == sum(done) > 0
    assert stats.bytes_read == stats.requests * source.layout.record_bytes


class Interrupted(SimpleQueue[Any]):
    """Interrupts whoever waits for the first time."""

    waits = 0

    def get(self, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            Interrupted.waits += 1
            if Interrupted.waits == 1:
                raise KeyboardInterrupt
        return super().get(*arguments, **options)


def test_an_interrupt_leaves_no_read_behind(
    source: PackedExperts, oracle: Oracle, disturb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next fetch must not race with reads of the one that was interrupted, which go into the same slots."""
    with PreadStore(source, SLOTS, threads=2) as store:
        disturb(slowed(0.02))
        monkeypatch.setattr(Interrupted, "waits", 0)
        monkeypatch.setattr(expert_reader, "SimpleQueue", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.fetch(0, range(6))
        after = np.asarray(store.fetch(1, [7]).host)[0].copy()
        time.sleep(0.1)
        assert after.tobytes() == oracle[1, 7]
        check(store.fetch(1, [7]), 1, [7], oracle)


def test_interrupts_anywhere_never_hang(source: PackedExperts, oracle: Oracle) -> None:
    """Real signals at random moments, as from a person who is impatient."""
    interrupted = 0
    with PreadStore(source, SLOTS, threads=3) as store:
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            for step in range(300):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-5 + 2e-6 * step)
                    store.fetch(step % LAYERS, [step % EXPERTS, (step + 3) % EXPERTS])
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        check(store.fetch(1, [7, 2]), 1, [7, 2], oracle)
    assert interrupted > 20


def test_a_forked_process_is_told(source: PackedExperts, tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from flashmoe_mlx.backends.pread import PreadStore
from flashmoe_mlx.expert_store import StoreClosedError
from flashmoe_mlx.pack.pack import open_pack
store = PreadStore(open_pack(Path(sys.argv[1])).experts["q4"])
store.fetch(0, [1])
if not os.fork():
    try:
        store.fetch(0, [1])
    except StoreClosedError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
store.close()
"""
    command = [sys.executable, "-c", script, str(source.directory.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.startswith("this store was opened by another process")


# Counting


def test_stats_add_up(store: PreadStore, source: PackedExperts) -> None:
    size = source.layout.record_bytes
    start = time.perf_counter()
    for layer, experts in ((0, [1, 2, 3]), (0, [1, 1]), (1, [])):
        store.fetch(layer, experts)
    elapsed = time.perf_counter() - start
    stats = store.stats()
    assert (stats.fetches, stats.requests, stats.hits, stats.misses) == (3, 4, 0, 4)
    assert (stats.reads, stats.bytes_read) == (4, 4 * size)
    assert 0 < stats.fetch_seconds <= elapsed
    store.fetch(2, [5])
    difference = store.stats() - stats
    assert (difference.fetches, difference.requests, difference.bytes_read) == (1, 1, size)
    assert stats + difference == store.stats()
    store.prefetch(0, [1])
    assert stats + difference == store.stats()


# Straight from a checkpoint


def test_nine_extents_make_the_same_record(checkpoint: Path, oracle: Oracle) -> None:
    experts: ExpertSource = sort_tensors(Checkpoint.open(checkpoint)).experts
    assert len(experts.extents(0, 0)) == 9
    assert len({extent.path for extent in experts.extents(0, 0)}) > 1
    with PreadStore(experts, SLOTS) as store:
        for layer in range(LAYERS):
            batch = store.fetch(layer, [11, 0, 6])
            for slot, expert in zip(batch.slots, (11, 0, 6), strict=True):
                payload = experts.layout.payload_bytes
                assert np.asarray(batch.host)[slot].tobytes()[:payload] == oracle[layer, expert][:payload]
        assert store.stats().reads == 9 * 3 * LAYERS


def test_a_checkpoint_cut_short_while_open(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    with PreadStore(sort_tensors(Checkpoint.open(folder)).experts) as store:
        store.fetch(0, [0])
        for path in folder.glob("*.safetensors"):
            os.truncate(path, 8)
        with pytest.raises(ExpertReadError, match="the file ends here") as caught:
            store.fetch(0, [1])
        assert_one_line(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slots=st.integers(1, EXPERTS),
    threads=st.integers(1, 4),
    requests=st.lists(
        st.tuples(st.integers(-1, LAYERS), st.lists(st.integers(-1, EXPERTS), max_size=EXPERTS)), max_size=8
    ),
)
def test_any_sequence_of_requests(
    source: PackedExperts, oracle: Oracle, slots: int, threads: int, requests: list[tuple[int, list[int]]]
) -> None:
    expected = fetches = 0
    with PreadStore(source, slots, threads) as store:
        for layer, experts in requests:
            valid = 0 <= layer < LAYERS and all(0 <= expert < EXPERTS for expert in experts)
            if not valid or len(set(experts)) > slots:
                with pytest.raises(ExpertRequestError):
                    store.fetch(layer, experts)
                continue
            check(store.fetch(layer, experts), layer, experts, oracle)
            fetches += 1
            expected += len(set(experts))
        stats = store.stats()
    assert (stats.fetches, stats.requests, stats.reads) == (fetches, expected, expected)
