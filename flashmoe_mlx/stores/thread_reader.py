"""A reader whose threads read experts straight into memory of the caller."""

import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Thread

from flashmoe_mlx.formats.extents import ExpertSource, read_exactly
from flashmoe_mlx.stores.contract import BackendUnavailableError
from flashmoe_mlx.stores.limits import THREADS
from flashmoe_mlx.stores.reads import (
    PARTS_AT_ONCE,
    FileDescriptorCache,
    Read,
    check_alignment,
    check_all_read,
    chunk_bytes,
    open_for_reading,
    part_bytes,
    plan_reads,
    total_bytes,
)

_Jobs = SimpleQueue[Callable[[], object] | None]


class ThreadReader:
    """A reader that makes positioned reads with several threads.

    Work reaches the threads through ``SimpleQueue``: it is the only primitive that an interrupt at any point cannot
    leave in a state in which the next use hangs.

    Args:
        source: the location of the experts.
        threads: number of threads, each of which makes one read at a time.
        chunk_mib: maximum size of one read in MiB; None for no limit.
        direct: whether reads bypass the page cache.
        readahead: whether the system may read beyond the requested bytes.

    Raises:
        InputError: an option is out of range (code "option_out_of_range"), or the source is not aligned for direct
            reads ("not_aligned").
        BackendUnavailableError: the system starts no more threads (code "no_threads").
    """

    def __init__(
        self,
        source: ExpertSource,
        threads: int,
        chunk_mib: float | None = None,
        direct: bool = False,
        readahead: bool = True,
    ) -> None:
        THREADS.check("threads", threads)
        self._chunk = chunk_bytes(chunk_mib)
        if direct:
            check_alignment(source)
        self._source = source
        self._direct = direct
        self._files = FileDescriptorCache(partial(open_for_reading, direct=direct, readahead=readahead))
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
            raise BackendUnavailableError(
                f"the system does not start {threads} threads ({error}); set a smaller backend.threads",
                code="no_threads",
            ) from error

    def read(
        self,
        layer: int,
        wanted: Sequence[tuple[int, memoryview]],
        arrived: Callable[[Sequence[int]], None] | None = None,
        begun: Callable[[], None] | None = None,
        done: Mapping[int, int] | None = None,
    ) -> tuple[int, int]:
        """Read ``wanted``, pairs of an expert and its row in memory; return the numbers of reads and bytes.

        After this method returns or raises an error, nothing is written to the rows.

        Args:
            layer: a valid layer.
            wanted: the experts and their rows.
            arrived: called, in the thread of the caller, with experts whose rows are complete. Threads then read parts
                of one expert together, so that the first expert arrives early.
            begun: called first, in the thread of the caller, as soon as the threads have their work.
            done: the bytes at the beginning of the records of some experts that need no read.

        Raises:
            ExpertReadError: an expert could not be read; this is the first failure.
            ExpertStoreError: no read failed, but fewer bytes arrived than were requested (code "lost_read").
        """
        chunk = self._chunk if arrived is None else part_bytes(self._chunk)
        reads = list(plan_reads(self._source, layer, wanted, chunk, done))
        batch = _Batch(partial(self._read, layer), reads, announces=arrived is not None)
        # The page cache, unlike a disk, is the faster the more threads copy from it.
        most = PARTS_AT_ONCE if arrived is not None and self._direct else len(self._queues)
        workers = min(len(reads), len(self._queues), most)
        try:
            for queue in self._queues[:workers]:
                queue.put(batch.work)
            if begun is not None:
                begun()
            made = batch.wait(workers, arrived)
        except BaseException:
            batch.todo.clear()
            self._settle()
            raise
        if batch.errors:
            raise batch.errors[0]
        count, nbytes = sum(count for count, _ in made), sum(nbytes for _, nbytes in made)
        check_all_read(layer, total_bytes(reads), nbytes)
        return count, nbytes

    def _settle(self) -> None:
        """Wait until every thread has finished its work, even if interrupts arrive during the wait."""
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

    def _read(self, layer: int, read: Read) -> int:
        try:
            return self._fill(read)
        except (EOFError, OSError) as error:
            raise read.failed(layer, error) from error

    def _fill(self, read: Read) -> int:
        """Make ``read``; return the number of system calls."""
        return read_exactly(self._files[read.path], read.view, read.offset)

    def close(self) -> None:
        """End the threads and close the files; no read may be running. Later calls have no effect."""
        self._end()
        for thread in self._threads:
            thread.join()
        self._files.close()


class _Batch:
    """Reads that several threads share.

    Each thread finally puts its numbers of reads and bytes into ``finished``; before, with ``announces``, each expert
    whose last read it made.
    """

    def __init__(self, read: Callable[[Read], int], reads: Sequence[Read], announces: bool) -> None:
        self._read = read
        self.todo = deque(reads)
        self.errors: list[BaseException] = []
        self.finished: SimpleQueue[tuple[int, int] | int] = SimpleQueue()
        counts = Counter(read.expert for read in reads if announces)
        self._left = {expert: list(range(count)) for expert, count in counts.items()}
        """As many numbers as an expert has reads; one thread alone takes the 0, after all reads have been made."""

    def wait(self, workers: int, arrived: Callable[[Sequence[int]], None] | None) -> list[tuple[int, int]]:
        """Pass on experts that arrive, until all ``workers`` have finished; return their numbers."""
        done: list[tuple[int, int]] = []
        while len(done) < workers:
            news = [self.finished.get()]
            while not self.finished.empty():  # no other thread takes from this queue
                news.append(self.finished.get())
            done += (item for item in news if isinstance(item, tuple))
            experts = [item for item in news if isinstance(item, int)]
            if experts and arrived is not None:
                arrived(experts)
        return done

    def work(self) -> None:
        """Make reads until none is left or one of them fails."""
        count = nbytes = 0
        try:
            while (read := self._next()) is not None:
                count += self._read(read)
                nbytes += len(read.view)
                left = self._left.get(read.expert)
                if left is not None and left.pop() == 0:
                    self.finished.put(read.expert)
        except BaseException as error:  # raised again by the waiting thread
            self.errors.append(error)
            self.todo.clear()
        self.finished.put((count, nbytes))

    def _next(self) -> Read | None:
        try:
            return self.todo.popleft()
        except IndexError:  # the queue is empty; an IndexError inside a read is a failure
            return None


def _serve(queue: _Jobs) -> None:
    while (job := queue.get()) is not None:
        job()
        del job  # it references the reader, whose finalizer ends this thread


def _end(queues: Sequence[_Jobs]) -> None:
    for queue in queues:
        queue.put(None)
