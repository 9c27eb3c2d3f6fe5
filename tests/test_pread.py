"""Tests of the pread store beyond the conformance suite: threads, chunks, hints, and real checkpoints."""

import errno
import gc
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from pack_oracle import assert_one_line, layer_bytes, published_parts, read_checkpoint
from systems import needs_linux
from tiny_checkpoints import GEOMETRIES, write_checkpoint

from flashmoe_mlx.backends.pread import PreadStore
from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.tensors import classify_tensors
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.stores import prefetches, read_ahead, slab, thread_reader
from flashmoe_mlx.stores.contract import BackendUnavailableError, ExpertReadError, ExpertStoreError
from flashmoe_mlx.stores.reads import FileDescriptorCache, open_for_reading
from flashmoe_mlx.testing.leaks import nothing_left_behind
from flashmoe_mlx.testing.store_tests import check
from flashmoe_mlx.testing.stored_experts import StoredExperts, write_experts


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredExperts:
    return write_experts(tmp_path_factory.mktemp("experts"), bits=4, contiguous=True)


def test_more_slots_than_memory(stored: StoredExperts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "total_memory", lambda: 100 * stored.source.layout.record_bytes)
    with nothing_left_behind(tmp_path), pytest.raises(InputError) as caught:
        PreadStore(stored.source, slots=101)
    assert caught.value.code == "not_enough_memory"
    assert_one_line(caught.value)


def test_threads_that_cannot_start(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    started = 0

    def failing(self: threading.Thread) -> None:
        nonlocal started
        started += 1
        if started > 2:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(BackendUnavailableError) as caught:
        PreadStore(stored.source, threads=5)
    assert caught.value.code == "no_threads"
    assert_one_line(caught.value)


@pytest.mark.parametrize(("chunk_mib", "reads"), [(None, 1), (1, 1), (1 / 64, 2), (1 / 128, 4), (0.005, 8)])
def test_experts_are_read_in_chunks(stored: StoredExperts, chunk_mib: float | None, reads: int) -> None:
    """Records here have 32 KiB, and chunks are whole pages."""
    with PreadStore(stored.source, threads=2, chunk_mib=chunk_mib) as store:
        check(store.fetch(1, [5]), 1, [5], stored)
        assert store.stats().reads == reads


def test_reads_of_one_byte(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: original(fd, [buffers[0][:1]], offset))
    with PreadStore(stored.source) as store:
        check(store.fetch(1, [2]), 1, [2], stored)
        assert store.stats().reads == len(stored.expected[1, 2])


def test_prefetches_are_used_or_wasted(stored: StoredExperts) -> None:
    size = stored.source.layout.record_bytes
    with PreadStore(stored.source) as store:
        store.prefetch(0, [3, 4, 5])
        _wait_for(lambda: all(job.ended for job in store._reader._hinted.values()))
        check(store.fetch(0, [5, 3, 7]), 0, [5, 3, 7], stored)
        stats = store.stats()
        assert (stats.misses, stats.prefetched, stats.bytes_read) == (3, 2, 3 * size)
        assert stats.bytes_wasted == size
        check(store.fetch(0, [4]), 0, [4], stored)  # the unused prefetch is gone
        assert store.stats().prefetched == 2


def test_a_stopped_prefetch_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped prefetch ends between two chunks, and its slot serves the new hint."""
    stored = write_experts(tmp_path, bits=4, contiguous=True)
    size = stored.source.layout.record_bytes
    monkeypatch.setattr(read_ahead, "_GUESSED_CHUNK", size // 8)
    begun, go = threading.Event(), threading.Event()
    original = os.preadv

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if threading.current_thread().name.startswith("expert-prefetch"):
            begun.set()
            go.wait(10)
        return original(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with PreadStore(stored.source, slots=2, threads=1) as store:
        store.prefetch(0, [1, 2])
        assert begun.wait(10)
        store.prefetch(3, [4, 5])  # one slot is still being written to, the other is free
        assert [expert for _, expert in store._reader._hinted] == [4]
        go.set()
        _wait_for(lambda: store._reader._hinted[3, 4].ended)
        check(store.fetch(3, [4, 5]), 3, [4, 5], stored)
        stats = store.stats()
        assert stats.prefetched == 1
        assert stats.bytes_wasted == size // 8
        store.prefetch(1, [6, 7])
        assert len(store._reader._hinted) == 2


def test_unused_prefetches_are_counted_at_the_end(stored: StoredExperts) -> None:
    store = PreadStore(stored.source)
    store.prefetch(0, [3])
    _wait_for(lambda: all(job.ended for job in store._reader._hinted.values()))
    store.close()
    assert store.stats().bytes_wasted == stored.source.layout.record_bytes


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@needs_linux
def test_direct_reads_open_files_with_o_direct(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[int] = []
    original = os.open

    def opened(path: Path, flag: int) -> int:
        flags.append(flag)
        return original(path, flag)

    monkeypatch.setattr(os, "open", opened)
    with PreadStore(stored.source, direct=True) as store:
        store.prefetch(1, [4])  # opens nothing yet
        assert flags == []
        check(store.fetch(1, [5]), 1, [5], stored)
    assert [flag & os.O_DIRECT for flag in flags] == [os.O_DIRECT]


def test_direct_reads_of_a_checkpoint_are_refused(tmp_path: Path) -> None:
    scattered = write_experts(tmp_path, bits=4, contiguous=False)
    with pytest.raises(InputError) as caught:
        PreadStore(scattered.source, direct=True)
    assert caught.value.code == "not_aligned"
    assert_one_line(caught.value)


@needs_linux
def test_a_filesystem_without_direct_reads(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "open", refuse)
    with PreadStore(stored.source, direct=True) as store, pytest.raises(ExpertReadError) as caught:
        store.fetch(0, [1])
    assert caught.value.code == "no_direct_reads"
    assert "direct=false" in caught.value.reason


# Lost reads


def test_an_index_error_inside_a_read_is_an_error(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    """An IndexError means that no read is left only if the queue raises it."""
    original = thread_reader.read_exactly

    def fail(fd: int, view: memoryview, offset: int) -> int:
        if offset == 5 * len(view):
            raise IndexError("from the read")
        return original(fd, view, offset)

    with PreadStore(stored.source) as store:
        monkeypatch.setattr(thread_reader, "read_exactly", fail)
        with pytest.raises(IndexError) as caught:
            store.fetch(0, [4, 5])
        assert caught.value.args == ("from the read",)
        monkeypatch.undo()
        check(store.fetch(0, [4, 5]), 0, [4, 5], stored)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_read_that_no_thread_makes(threads: int, stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    """If fewer bytes arrive than requested, the fetch fails instead of serving the old content of the slot."""
    original = thread_reader._Batch._next

    def lose_the_last(batch: Any) -> Any:
        read = original(batch)
        return None if read is not None and read.expert == 5 else read

    with PreadStore(stored.source, threads=threads) as store:
        check(store.fetch(1, [4, 5]), 1, [4, 5], stored)
        before = store.stats()
        monkeypatch.setattr(thread_reader._Batch, "_next", lose_the_last)
        with pytest.raises(ExpertStoreError) as caught:
            store.fetch(0, [4, 5])
        assert caught.value.code == "lost_read"
        assert_one_line(caught.value)
        assert store.stats() == before
        monkeypatch.undo()
        check(store.fetch(0, [4, 5]), 0, [4, 5], stored)


def test_an_incomplete_prefetch_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An incomplete prefetch is not used; the fetch reads the record."""
    stored = write_experts(tmp_path, bits=4, contiguous=True)
    monkeypatch.setattr(read_ahead, "_GUESSED_CHUNK", stored.source.layout.record_bytes // 4)
    original, count = prefetches.read_exactly, itertools.count(1)

    def fail_the_third(*arguments: Any) -> int:
        if next(count) == 3:
            raise OSError(errno.EIO, "broken")
        return original(*arguments)

    monkeypatch.setattr(prefetches, "read_exactly", fail_the_third)
    with PreadStore(stored.source) as store:
        store.prefetch(0, [3])
        _wait_for(lambda: all(job.ended for job in store._reader._hinted.values()))
        check(store.fetch(0, [3]), 0, [3], stored)
        assert store.stats().prefetched == 0


def test_a_prefetch_thread_survives_any_error(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise IndexError

    monkeypatch.setattr(prefetches, "read_exactly", fail)
    with PreadStore(stored.source, threads=1) as store:
        store.prefetch(0, [3])
        _wait_for(lambda: all(job.ended for job in store._reader._hinted.values()))
        check(store.fetch(0, [3]), 0, [3], stored)
        assert store.stats().prefetched == 0
        monkeypatch.undo()
        store.prefetch(0, [4])
        _wait_for(lambda: all(job.ended for job in store._reader._hinted.values()))
        check(store.fetch(0, [4]), 0, [4], stored)
        assert store.stats().prefetched == 1


def test_a_prefetch_that_ends_while_it_is_counted(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a stopped prefetch count as wasted exactly once, whenever it ends."""
    size = stored.source.layout.record_bytes
    asked: list[bool] = []
    with PreadStore(stored.source) as store:
        store.prefetch(0, [3])
        _wait_for(lambda: all(job.ended for job in store._reader._hinted.values()))

        def end_after_the_first_look(_: object) -> bool:
            asked.append(True)
            return len(asked) > 1

        monkeypatch.setattr(prefetches.ThreadPrefetch, "ended", property(end_after_the_first_look))
        reader = store._reader
        reader._stop(reader._hinted.values())
        reader._hinted = {}
        assert reader._wasted() == 0
        assert reader._wasted() == size
        assert reader._wasted() == 0


def test_unclosed_files_are_closed_at_the_last_reference(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    with nothing_left_behind(tmp_path):
        files = FileDescriptorCache(open_for_reading)
        files[path]
        del files
        gc.collect()


def test_files_may_be_opened_after_a_close(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    with nothing_left_behind(tmp_path):
        files = FileDescriptorCache(open_for_reading)
        files[path]
        files.close()
        files[path]
        files.close()
        files.close()


class Interrupted(SimpleQueue[Any]):
    """A queue that interrupts the first wait of the main thread."""

    waits = 0

    def get(self, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            Interrupted.waits += 1
            if Interrupted.waits == 1:
                raise KeyboardInterrupt
        return super().get(*arguments, **options)


def test_no_read_runs_on_after_an_interrupt(stored: StoredExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of an interrupted fetch end before the next fetch uses the same slots."""
    original = os.preadv

    def slow(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        time.sleep(0.02)
        return original(fd, buffers, offset)

    with PreadStore(stored.source, 6, threads=2) as store:
        monkeypatch.setattr(os, "preadv", slow)
        monkeypatch.setattr(Interrupted, "waits", 0)
        monkeypatch.setattr(thread_reader, "SimpleQueue", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.fetch(0, range(6))
        after = bytes(store.fetch(1, [7]).host[0])
        time.sleep(0.1)
        assert after == stored.expected[1, 7]
        check(store.fetch(1, [7]), 1, [7], stored)


# A real checkpoint

GEOMETRY = GEOMETRIES["wide"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", GEOMETRY, 0, "mlx4", shards=4)


def test_a_record_of_nine_extents(checkpoint: Path) -> None:
    experts = classify_tensors(Checkpoint.open(checkpoint)).experts
    tensors, size, payload = read_checkpoint(checkpoint), experts.layout.record_bytes, experts.layout[0].payload_bytes
    assert len(experts.extents(0, 0)) == 9
    assert len({extent.path for extent in experts.extents(0, 0)}) > 1
    with PreadStore(experts, 6) as store:
        for layer in range(GEOMETRY.num_layers):
            expected = layer_bytes(published_parts(tensors, layer))
            for expert, view in zip((11, 0, 6), store.fetch(layer, [11, 0, 6]).host, strict=True):
                assert bytes(view[:payload]) == expected[expert * size : expert * size + payload]
        assert store.stats().reads == 9 * 3 * GEOMETRY.num_layers


def test_adjacent_extents_are_one_read(tmp_path: Path) -> None:
    """Dense checkpoints fuse gate and up, so both are one read."""
    folder = write_checkpoint(tmp_path / "checkpoint", GEOMETRY, 0, "fused")
    experts = classify_tensors(Checkpoint.open(folder)).experts
    assert len(experts.extents(0, 0)) == 3
    with PreadStore(experts, 6) as store:
        host = store.fetch(1, [4]).host[0]
        assert store.stats().reads == 2
        expected = b"".join(
            extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes] for extent in experts.extents(1, 4)
        )
        assert bytes(host[: len(expected)]) == expected


def test_a_checkpoint_truncated_while_open(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    with PreadStore(classify_tensors(Checkpoint.open(folder)).experts) as store:
        store.fetch(0, [0])
        for path in folder.glob("*.safetensors"):
            os.truncate(path, 8)
        with pytest.raises(ExpertReadError) as caught:
            store.fetch(0, [1])
        assert caught.value.code == "file_ends_early"
        assert_one_line(caught.value)


def test_the_slab_is_aligned_for_direct_reads(stored: StoredExperts) -> None:
    with PreadStore(stored.source, slots=3) as store:
        batch = store.fetch(0, [1, 2, 3])
        addresses = [np.frombuffer(view, np.uint8).ctypes.data for view in batch.host]
        assert [address % 16384 for address in addresses] == [0, 0, 0]
