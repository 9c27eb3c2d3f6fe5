"""Read experts with several threads at once, straight into memory that the caller owns; what stores are built from."""

import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.expert_store import BackendUnavailableError, ExpertReadError, ExpertSource
from flashmoe_mlx.pack.files import read_exactly

_Jobs = SimpleQueue[Callable[[], object] | None]


class ExpertReader:
    """Reads experts of ``source``, each by one of ``threads`` threads.

    An interrupt may arrive anywhere: ``SimpleQueue`` is the one way of handing work to threads that it cannot leave in
    a state in which the next hand-over would hang.
    """

    def __init__(self, source: ExpertSource, threads: int) -> None:
        if threads < 1:
            raise InputError(f"threads={threads}: at least 1 thread must read")
        self._source = source
        self._files: dict[Path, int] = {}
        self._queues: list[_Jobs] = []
        self._threads: list[Thread] = []
        self._end = weakref.finalize(self, _end, self._queues)
        try:
            for number in range(threads):
                queue: _Jobs = SimpleQueue()
                thread = Thread(target=_serve, args=(queue,), name=f"expert-reader-{number}", daemon=True)
                thread.start()
                self._queues.append(queue)
                self._threads.append(thread)
        except RuntimeError as error:
            self.close()
            raise BackendUnavailableError(f"cannot start {threads} threads: {error}; choose fewer threads") from error

    def read(self, layer: int, wanted: Sequence[tuple[int, memoryview]]) -> tuple[int, int]:
        """Fill the row of each (expert, row) of ``wanted``; the number of reads and of bytes.

        Whatever happens, no row is written to any more when this returns.

        Raises:
            ExpertReadError: an expert could not be read; the first one that failed.
        """
        batch = _Batch(partial(self._read_expert, layer), wanted)
        workers = min(len(wanted), len(self._queues))
        try:
            for queue in self._queues[:workers]:
                queue.put(batch.work)
            counts = [batch.finished.get() for _ in range(workers)]
        except BaseException:
            batch.todo.clear()
            self._settle()
            raise
        if batch.errors:
            raise batch.errors[0]
        return sum(reads for reads, _ in counts), sum(nbytes for _, nbytes in counts)

    def _settle(self) -> None:
        """Wait until every thread is done with what it was given before, however often that is interrupted."""
        while True:
            done: SimpleQueue[None] = SimpleQueue()
            try:
                for queue in self._queues:
                    queue.put(partial(done.put, None))
                for _ in self._queues:
                    done.get()
            except KeyboardInterrupt:
                continue
            return

    def _read_expert(self, layer: int, expert: int, row: memoryview) -> tuple[int, int]:
        reads = done = 0
        for extent in self._source.extents(layer, expert):
            view = row[done : done + extent.nbytes]
            try:
                reads += read_exactly(self._file(extent.path), view, extent.offset)
            except EOFError as error:
                end = error.args[0]
                raise ExpertReadError(extent.path, layer, expert, end, "the file ends here, in mid-record") from None
            except OSError as error:
                reason = error.strerror or str(error)
                raise ExpertReadError(extent.path, layer, expert, extent.offset, reason) from error
            done += extent.nbytes
        return reads, done

    def _file(self, path: Path) -> int:
        fd = self._files.get(path)
        if fd is None:
            fd = os.open(path, os.O_RDONLY)
            # Another thread may have opened it meanwhile; one descriptor stays.
            if self._files.setdefault(path, fd) != fd:
                os.close(fd)
                fd = self._files[path]
        return fd

    def close(self) -> None:
        """End the threads and close the files; no read may be under way. May be called again."""
        self._end()
        for thread in self._threads:
            thread.join()
        while self._files:
            os.close(self._files.popitem()[1])


class _Batch:
    """Work that several threads share; each puts what it did into ``finished`` when nothing is left."""

    def __init__(
        self, read: Callable[[int, memoryview], tuple[int, int]], wanted: Sequence[tuple[int, memoryview]]
    ) -> None:
        self._read = read
        self.todo = deque(wanted)
        self.errors: list[BaseException] = []
        self.finished: SimpleQueue[tuple[int, int]] = SimpleQueue()

    def work(self) -> None:
        reads = nbytes = 0
        try:
            while self.todo:
                more = self._read(*self.todo.popleft())
                reads, nbytes = reads + more[0], nbytes + more[1]
        except IndexError:
            pass  # another thread took the last one
        except BaseException as error:  # given to the thread that waits
            self.errors.append(error)
            self.todo.clear()
        self.finished.put((reads, nbytes))


def _serve(queue: _Jobs) -> None:
    while (job := queue.get()) is not None:
        job()


def _end(queues: Sequence[_Jobs]) -> None:
    for queue in queues:
        queue.put(None)
