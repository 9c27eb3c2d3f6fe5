"""What is the io_uring store's own: saying why it cannot run, direct reads, the ring after an interrupt."""

import ctypes
import errno
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pack_oracle import assert_one_line
from systems import needs_io_uring, needs_linux

from flashmoe_mlx.backends.io_uring import UringStore
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.expert_store import BackendUnavailableError
from flashmoe_mlx.storage.uring import Ring, RingRead
from flashmoe_mlx.testing.store_tests import check
from flashmoe_mlx.testing.stored_experts import StoredExperts, write_experts


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredExperts:
    return write_experts(tmp_path_factory.mktemp("experts"), bits=4, in_one_piece=True)


def failing(code: int) -> Any:
    def call(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


@needs_linux
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSYS, r"this kernel \(.*\) is too old or built without it"),
        (errno.EINVAL, r"this kernel \(.*\) is too old"),
        (errno.EPERM, "forbidden here, by the container's seccomp profile or kernel.io_uring_disabled"),
        (errno.EACCES, "forbidden here"),
        (errno.ENOMEM, r"locked memory \(ulimit -l\) is too low"),
        (errno.EMFILE, "too many files are open"),
        (errno.EFAULT, "Bad address"),
    ],
)
def test_a_system_without_it_is_told_why(
    code: int, reason: str, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ring, "_call", failing(code))
    with pytest.raises(BackendUnavailableError, match=f"not available: .*{reason}.*; use backend=pread") as caught:
        UringStore(stored.source)
    assert_one_line(caught.value)


def test_another_system_is_told_so(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BackendUnavailableError, match="io_uring exists on Linux alone; use backend=pread"):
        UringStore(stored.source)


@needs_io_uring
def test_memory_that_may_not_be_pinned(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(list(Path("/dev/fd").iterdir()))
    monkeypatch.setattr(Ring, "register_buffers", failing(errno.ENOMEM))
    with pytest.raises(BackendUnavailableError, match=r"cannot pin 1 MB .*ulimit -l.*registered=false") as caught:
        UringStore(stored.source, registered=True)
    assert_one_line(caught.value)
    assert len(list(Path("/dev/fd").iterdir())) == before


@needs_linux
def test_direct_reads_need_a_pack(tmp_path: Path) -> None:
    scattered = write_experts(tmp_path, bits=4, in_one_piece=False)
    with pytest.raises(InputError, match=r"direct=true: .* is not aligned to 4096 bytes.*task=pack") as caught:
        UringStore(scattered.source)
    assert_one_line(caught.value)


@pytest.mark.parametrize("depth", [0, -1, 5000])
def test_depths_that_make_no_ring(depth: int, stored: StoredExperts) -> None:
    with pytest.raises(InputError, match=f"depth={depth}: must be from 1 to 4096"):
        UringStore(stored.source, depth=depth)


@needs_io_uring
def test_more_reads_than_the_ring_holds(stored: StoredExperts) -> None:
    with UringStore(stored.source, slots=12, depth=3, chunk_mib=1 / 256) as store:
        for layer in range(4):
            check(store.fetch(layer, range(12)), layer, list(range(12)), stored)
        assert store.stats().reads == 4 * 12 * 8


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring(8, workers=True)
    yield ring
    ring.close()


@needs_io_uring
def test_errors_are_numbers_and_do_not_stop_the_others(ring: Ring, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    fd = os.open(path, os.O_RDONLY)
    good = ring.register_file(fd)
    os.close(fd)  # the ring keeps it open
    room = memoryview(bytearray(300))
    reads = [RingRead(good, 0, room[:100]), RingRead(99, 0, room[100:200]), RingRead(good, 150, room[200:300])]
    reads.append(RingRead(good, 500, room[:1]))
    assert ring.run(reads) == [100, -errno.EBADF, 50, 0]
    assert bytes(room[:100]) == bytes(range(100))
    assert bytes(room[200:250]) == bytes(range(150, 200))


@needs_io_uring
def test_an_interrupt_while_the_kernel_writes(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """The read of an empty pipe is under way when the interrupt comes; nothing is given up before it has ended."""
    reading, writing = os.pipe()
    number = ring.register_file(reading)
    original = Ring._call
    entered = threading.Event()

    def call(self: Ring, *arguments: Any) -> int:
        if not entered.is_set():
            entered.set()
            self._libc.syscall(*map(ctypes.c_long, (426, self._fd, 1, 0, 0, 0, 0)))  # hands over, waits for nothing
            threading.Timer(0.05, os.write, (writing, b"late")).start()
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Ring, "_call", call)
    room = bytearray(4)
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        ring.run([RingRead(number, 0, memoryview(room))])
    assert time.perf_counter() - start > 0.04
    assert room == b"late"
    monkeypatch.undo()
    os.write(writing, b"next")
    assert ring.run([RingRead(number, 0, memoryview(room))]) == [4]
    assert room == b"next"
    os.close(reading)
    os.close(writing)


@needs_io_uring
def test_other_threads_run_while_it_waits(ring: Ring) -> None:
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
    assert ring.run([RingRead(number, 0, memoryview(room))]) == [1]
    done.set()
    counting.join()
    os.close(reading)
    assert counted > 10_000
