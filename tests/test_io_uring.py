"""Tests of the io_uring store beyond the conformance suite: systems without it, pinned slots, and the ring."""

import ctypes
import errno
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pack_oracle import assert_one_line
from systems import needs_io_uring, needs_linux

from flashmoe_mlx.backends.io_uring import UringStore
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.stores import uring_reader
from flashmoe_mlx.stores.contract import BackendUnavailableError, ExpertReadError, ExpertStoreError
from flashmoe_mlx.stores.libc import load_libc
from flashmoe_mlx.stores.slab import Slab
from flashmoe_mlx.stores.uring import Ring, RingRead
from flashmoe_mlx.stores.uring_reader import UringReader
from flashmoe_mlx.testing.leaks import nothing_left_behind
from flashmoe_mlx.testing.store_tests import check
from flashmoe_mlx.testing.stored_experts import StoredExperts, write_experts


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredExperts:
    return write_experts(tmp_path_factory.mktemp("experts"), bits=4, contiguous=True)


def failing(code: int) -> Any:
    def call(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


@needs_linux
@pytest.mark.parametrize(
    ("code", "fact"),
    [
        (errno.ENOSYS, "too old"),
        (errno.EINVAL, "too old"),
        (errno.EPERM, "kernel.io_uring_disabled"),
        (errno.EACCES, "kernel.io_uring_disabled"),
        (errno.ENOMEM, "ulimit -l"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EFAULT, os.strerror(errno.EFAULT)),
    ],
)
def test_a_system_without_io_uring(
    code: int, fact: str, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ring, "_call", failing(code))
    with pytest.raises(BackendUnavailableError) as caught:
        UringStore(stored.source)
    assert caught.value.code == "no_io_uring"
    assert fact in str(caught.value)
    assert_one_line(caught.value)


def test_an_operating_system_without_io_uring(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BackendUnavailableError) as caught:
        UringStore(stored.source)
    assert caught.value.code == "no_io_uring"


@needs_io_uring
@pytest.mark.parametrize(("code", "limit"), [(errno.ENOMEM, True), (errno.EFAULT, False)])
def test_memory_that_cannot_be_pinned(
    code: int, limit: bool, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The message names the limit of locked memory, except for memory of CUDA, which no limit affects."""
    monkeypatch.setattr(Ring, "register_buffers", failing(code))
    with nothing_left_behind(tmp_path), pytest.raises(BackendUnavailableError) as caught:
        UringStore(stored.source, registered=True)
    assert caught.value.code == "cannot_pin"
    assert ("ulimit -l" in str(caught.value)) == limit
    assert "registered=false" in str(caught.value)
    assert_one_line(caught.value)


@needs_linux
def test_direct_reads_need_a_pack(tmp_path: Path) -> None:
    scattered = write_experts(tmp_path, bits=4, contiguous=False)
    with pytest.raises(InputError) as caught:
        UringStore(scattered.source)
    assert caught.value.code == "not_aligned"
    assert_one_line(caught.value)


@pytest.mark.parametrize("depth", [0, -1, 5000])
def test_invalid_depths(depth: int, stored: StoredExperts) -> None:
    with pytest.raises(InputError) as caught:
        UringStore(stored.source, depth=depth)
    assert caught.value.code == "option_out_of_range"
    assert_one_line(caught.value)


@needs_io_uring
def test_registered_slots_also_serve_hints(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read of the ring goes to pinned memory, before and after hints, whichever slots are free."""
    buffers: list[int | None] = []
    original = Ring.submit

    def submit(ring: Ring, reads: Sequence[RingRead]) -> list[int]:
        buffers.extend(read.buffer for read in reads)
        return original(ring, reads)

    monkeypatch.setattr(Ring, "submit", submit)
    with UringStore(stored.source, slots=3, registered=True, chunk_mib=1 / 128) as store:
        slab = store._reader._slab
        for step in range(40):
            layer, experts = step % 4, [step % 12, (step + 5) % 12, (step + 7) % 12]
            if step >= 10:
                store.prefetch(layer, [experts[1], (step + 1) % 12, (step + 3) % 12])
                if step % 2:
                    time.sleep(0.002)
            check(store.fetch(layer, experts), layer, experts, stored)
        assert store._reader._slab is slab  # the pinned slab
        assert store.stats().prefetched > 0
        assert len(store._reader._reader._buffers) == slab.count == 6  # for a batch and for prefetches
    assert buffers
    assert None not in buffers


@needs_io_uring
def test_unregistered_rows_are_refused(stored: StoredExperts) -> None:
    size = stored.source.layout.record_bytes
    reader = UringReader(stored.source, 4, registered=Slab(2, size))
    with pytest.raises(ValueError, match="not registered"):  # a bug of the caller, which has no code
        reader.read(0, [(1, memoryview(bytearray(size)))])
    reader.close()


@needs_io_uring
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_read_that_the_ring_never_answers(lost: int, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fetch fails instead of serving the old content of the slot."""
    original = Ring._prepare

    def prepare(ring: Ring, place: int, number: int, read: RingRead) -> None:
        original(ring, place, 3 if number == 3 + lost else number, read)  # the first fetch had the numbers up to 2

    with UringStore(stored.source, slots=3) as store:
        check(store.fetch(0, [1, 2, 3]), 0, [1, 2, 3], stored)
        monkeypatch.setattr(Ring, "_prepare", prepare)
        if lost:
            with pytest.raises(ExpertReadError):
                store.fetch(1, [4, 5, 6])
        monkeypatch.undo()
        check(store.fetch(1, [4, 5, 6]), 1, [4, 5, 6], stored)


@needs_io_uring
@pytest.mark.parametrize("wrong", [1, -4096])
def test_a_ring_with_a_wrong_total(wrong: int, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Ring.ended

    def ended(ring: Ring, at_least: int = 0) -> list[tuple[int, int]]:
        return [(number, result + max(wrong, 0)) for number, result in original(ring, at_least)]

    monkeypatch.setattr(Ring, "ended", ended)
    if wrong < 0:  # more bytes are planned than the ring was asked for
        monkeypatch.setattr(uring_reader, "total_bytes", lambda reads: sum(len(r.view) for r in reads) - wrong)
    with UringStore(stored.source, slots=3) as store, pytest.raises(ExpertStoreError) as caught:
        store.fetch(1, [4, 5, 6])
    assert caught.value.code == "lost_read"
    assert_one_line(caught.value)


@needs_io_uring
def test_an_unclosed_ring_is_closed_at_the_last_reference(tmp_path: Path) -> None:
    with nothing_left_behind(tmp_path):
        ring = Ring(4, workers=False)
        del ring
        gc.collect()


@needs_io_uring
def test_a_ring_may_be_closed_twice(tmp_path: Path) -> None:
    with nothing_left_behind(tmp_path):
        ring = Ring(4, workers=False)
        ring.close()
        ring.close()


@needs_io_uring
def test_more_reads_than_the_ring_holds(stored: StoredExperts) -> None:
    with UringStore(stored.source, slots=12, depth=3, chunk_mib=1 / 256) as store:
        for layer in range(4):
            check(store.fetch(layer, range(12)), layer, list(range(12)), stored)
        assert store.stats().reads == 4 * 12 * 8


def run(ring: Ring, reads: Sequence[RingRead]) -> list[int]:
    """Make ``reads``; return their results."""
    try:
        numbers, results = ring.submit(reads), dict[int, int]()
        while len(results) < len(reads):
            results.update(ring.ended(1))
    except BaseException:
        ring.settle()
        raise
    return [results[number] for number in numbers]


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring(8, workers=True)
    yield ring
    ring.close()


@needs_io_uring
def test_a_failed_read_does_not_affect_other_reads(ring: Ring, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    fd = os.open(path, os.O_RDONLY)
    good = ring.register_file(fd)
    os.close(fd)  # the ring keeps it open
    room = memoryview(bytearray(300))
    reads = [RingRead(good, 0, room[:100]), RingRead(99, 0, room[100:200]), RingRead(good, 150, room[200:300])]
    reads.append(RingRead(good, 500, room[:1]))
    assert run(ring, reads) == [100, -errno.EBADF, 50, 0]
    assert bytes(room[:100]) == bytes(range(100))
    assert bytes(room[200:250]) == bytes(range(150, 200))


@needs_io_uring
def test_an_interrupt_while_the_kernel_writes(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt during the read of an empty pipe arrives only after that read has ended."""
    reading, writing = os.pipe()
    number = ring.register_file(reading)
    original = Ring._call
    entered = threading.Event()

    def call(self: Ring, *arguments: Any) -> int:
        if not entered.is_set():
            entered.set()
            load_libc().syscall(*map(ctypes.c_long, (426, self._fd, 1, 0, 0, 0, 0)))  # submits without waiting
            threading.Timer(0.05, os.write, (writing, b"late")).start()
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Ring, "_call", call)
    room = bytearray(4)
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run(ring, [RingRead(number, 0, memoryview(room))])
    assert time.perf_counter() - start > 0.04
    assert room == b"late"
    monkeypatch.undo()
    os.write(writing, b"next")
    assert run(ring, [RingRead(number, 0, memoryview(room))]) == [4]
    assert room == b"next"
    os.close(reading)
    os.close(writing)


@needs_io_uring
def test_other_threads_run_during_a_wait(ring: Ring) -> None:
    reading, writing = os.pipe()
    number = ring.register_file(reading)
    room = bytearray(1)
    counted = 0
    done = threading.Event()

    def count() -> None:
        nonlocal counted
        while not done.is_set():
            counted += 1
        os.close(writing)

    counting = threading.Thread(target=count)
    threading.Timer(0.1, os.write, (writing, b"x")).start()
    counting.start()
    assert run(ring, [RingRead(number, 0, memoryview(room))]) == [1]
    done.set()
    counting.join()
    os.close(reading)
    assert counted > 10_000
