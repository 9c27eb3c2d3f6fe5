"""A ring of io_uring, which takes many reads in one system call.

``ctypes`` calls the interface of the kernel (``linux/io_uring.h``, io_uring(7), io_uring_enter(2)) and releases the
interpreter's lock during system calls. Only one thread at a time may use a ring.

A read that ends while no thread is inside a system call is noticed by its entry in the completion queue, whose tail the
kernel stores last. Python cannot load with acquire semantics, so ``ended`` makes a system call before it reports such a
read: on any processor the writes of the kernel then come before the reads of this process.
"""

import ctypes
import errno
import mmap
import os
import platform
import struct
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from flashmoe_mlx.stores.contract import BackendUnavailableError
from flashmoe_mlx.stores.libc import address_of, load_libc

# The numbers of the system calls on all architectures but Alpha.
_SETUP, _ENTER, _REGISTER = 425, 426, 427
_SQ_RING, _SQES = 0, 0x1000_0000  # offsets for mmap
_SETUP_CLAMP = 1 << 4
_FEATURES = 1 << 0 | 1 << 3  # SINGLE_MMAP; RW_CUR_POS, which proves Linux 5.6, the first with plain reads
_ENTER_GETEVENTS = 1 << 0
_REGISTER_BUFFERS, _REGISTER_FILES, _REGISTER_FILES_UPDATE = 0, 2, 6
_OP_READ_FIXED, _OP_READ = 4, 22
_SQE_FIXED_FILE, _SQE_ASYNC = 1 << 0, 1 << 4

_PARAMS = struct.Struct("<5I2I3I 8IQ 8IQ")  # struct io_uring_params
_SQE = struct.Struct("<BBHiQQIIQHHiQQ")  # struct io_uring_sqe for a read
_CQE = struct.Struct("<QiI")  # struct io_uring_cqe
_FILES = 1024
"""Maximum number of files that can be registered with a ring."""


@dataclass(frozen=True, slots=True)
class RingRead:
    """A read that fills ``view`` from ``offset`` of a registered file.

    ``file`` is the number that ``Ring.register_file`` returned. ``buffer`` is the index of the registered buffer that
    contains ``view``, or None. With ``by_worker`` a thread of the kernel makes the read, so that its submission never
    waits.
    """

    file: int
    offset: int
    view: memoryview
    buffer: int | None = None
    by_worker: bool = False


class Ring:
    """A ring for simultaneous reads.

    Args:
        entries: maximum number of simultaneous reads.
        workers: whether threads of the kernel make all reads; otherwise the system call itself makes the reads of
            cached pages.

    Raises:
        BackendUnavailableError: the system has no io_uring or forbids it (code "no_io_uring").
    """

    def __init__(self, entries: int, workers: bool) -> None:
        if sys.platform != "linux":
            raise BackendUnavailableError("only Linux has io_uring; use backend=pread", code="no_io_uring")
        params = bytearray(_PARAMS.size)
        struct.pack_into("<I", params, 8, _SETUP_CLAMP)
        try:
            self._fd = self._call(_SETUP, entries, params)
        except OSError as error:
            _unavailable(error)
        self._maps: list[mmap.mmap] = []
        self._views: list[memoryview] = []
        self._end = weakref.finalize(self, _free, self._fd, self._views, self._maps)
        self._files = self._submitted = 0
        self._process = os.getpid()
        self._running: dict[int, RingRead] = {}
        """Submitted reads that have not ended, by number."""
        try:
            self._map(_PARAMS.unpack(params))
            # The table of registered files; -1 marks an entry that is set later.
            holes = bytearray(struct.pack(f"<{_FILES}i", *[-1] * _FILES))
            self._call(_REGISTER, self._fd, _REGISTER_FILES, holes, _FILES)
        except OSError as error:
            self._end()
            _unavailable(error)
        self._flags = _SQE_FIXED_FILE | (_SQE_ASYNC if workers else 0)

    def _map(self, params: tuple[int, ...]) -> None:
        sq_entries, cq_entries, _, _, _, features = params[:6]
        if features & _FEATURES != _FEATURES:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        head, tail, mask, _, _, _, array = params[10:17]
        cq_head, cq_tail, cq_mask, _, _, cqes = params[19:25]
        size = max(array + 4 * sq_entries, cqes + _CQE.size * cq_entries)
        rings = self._mapped(_SQ_RING, size)
        words = rings[: size // 4 * 4].cast("I")
        self._views.append(words)
        self._sqes = self._mapped(_SQES, _SQE.size * sq_entries)
        self._cqes = rings[cqes : cqes + _CQE.size * cq_entries]
        self._views.append(self._cqes)
        self._words = words
        self._sq_head, self._sq_tail, self._cq_head, self._cq_tail = head // 4, tail // 4, cq_head // 4, cq_tail // 4
        self._sq_mask, self._cq_mask = words[mask // 4], words[cq_mask // 4]
        self.entries = sq_entries
        for index in range(sq_entries):  # each place of the queue always holds the entry with the same index
            words[array // 4 + index] = index

    def _mapped(self, offset: int, size: int) -> memoryview:
        mapped = mmap.mmap(self._fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=offset)
        self._maps.append(mapped)
        view = memoryview(mapped)
        self._views.append(view)
        return view

    def _call(self, number: int, *arguments: int | bytearray) -> int:
        words = [a if isinstance(a, int) else address_of(a) for a in (*arguments, 0, 0)]
        result = int(load_libc().syscall(ctypes.c_long(number), *map(ctypes.c_ulong, words)))
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result

    def register_file(self, fd: int) -> int:
        """Register the open file ``fd``, which the ring keeps open; return its number for ``RingRead``.

        Raises:
            OSError: there are too many files (EMFILE), or the kernel refuses.
        """
        slot = self._files
        if slot == _FILES:
            raise OSError(errno.EMFILE, f"more than {_FILES} files")
        value = bytearray(struct.pack("<i", fd))
        update = bytearray(struct.pack("<IIQ", slot, 0, address_of(value)))  # struct io_uring_files_update
        self._call(_REGISTER, self._fd, _REGISTER_FILES_UPDATE, update, 1)
        self._files += 1
        return slot

    def register_buffers(self, buffers: Sequence[memoryview]) -> None:
        """Pin ``buffers`` of at most 1 GiB each; ``RingRead.buffer`` is an index into them.

        Raises:
            OSError: the kernel refuses.
        """
        vectors = bytearray(
            struct.pack(f"<{2 * len(buffers)}Q", *(n for b in buffers for n in (address_of(b), len(b))))
        )
        self._call(_REGISTER, self._fd, _REGISTER_BUFFERS, vectors, len(buffers))

    @property
    def running(self) -> int:
        """Number of submitted reads that ``ended`` has not reported."""
        return self._words[self._sq_tail] - self._words[self._cq_head] & 0xFFFFFFFF

    @property
    def free(self) -> int:
        """Number of reads that can be submitted before others must end."""
        return self.entries - self.running

    def submit(self, reads: Sequence[RingRead]) -> list[int]:
        """Begin at most ``free`` reads; return their numbers, by which ``ended`` reports them.

        Until a read has ended, and after an error until ``settle`` returns, its view may be written to.
        """
        tail, first = self._words[self._sq_tail], self._submitted
        self._submitted += len(reads)
        for index, read in enumerate(reads):
            self._running[first + index] = read  # keeps the view alive
            self._prepare(tail + index & self._sq_mask, first + index, read)
        self._words[self._sq_tail] = tail + len(reads) & 0xFFFFFFFF
        self._wait(0)
        return list(range(first, first + len(reads)))

    def ended(self, at_least: int = 0) -> list[tuple[int, int]]:
        """Wait until ``at_least`` submitted reads have ended, or all if there are fewer; return all that have.

        Returns:
            The number of each read, and the number of bytes read or the negated error number.
        """
        words = self._words
        at_least = min(at_least, self.running)
        if not at_least and words[self._cq_tail] == words[self._cq_head]:
            return []
        self._wait(max(1, at_least))
        head, tail = words[self._cq_head], words[self._cq_tail]
        places = range(tail - head & 0xFFFFFFFF)
        positions = ((head + place & self._cq_mask) * _CQE.size for place in places)
        entries = [_CQE.unpack_from(self._cqes, position) for position in positions]
        words[self._cq_head] = tail
        for number, _, _ in entries:
            self._running.pop(number, None)
        return [(number, result) for number, result, _ in entries]

    def _prepare(self, place: int, number: int, read: RingRead) -> None:
        opcode, buffer = (_OP_READ, 0) if read.buffer is None else (_OP_READ_FIXED, read.buffer)
        flags = self._flags | (_SQE_ASYNC if read.by_worker else 0)
        _SQE.pack_into(
            self._sqes,
            place * _SQE.size,
            *(opcode, flags, 0, read.file, read.offset, address_of(read.view), len(read.view), 0, number),
            *(buffer, 0, 0, 0, 0),
        )

    def _wait(self, count: int) -> None:
        """Submit the entries of the submission queue and wait until ``count`` reads have ended."""
        words = self._words
        while True:
            waiting = words[self._sq_tail] - words[self._sq_head] & 0xFFFFFFFF
            try:
                if waiting or count:
                    self._call(_ENTER, self._fd, waiting, count, _ENTER_GETEVENTS if count else 0)
            except OSError as error:
                # EINTR: a signal. EAGAIN, EBUSY: the kernel has no room until some reads have ended.
                if error.errno not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                    raise
            waiting = words[self._sq_tail] - words[self._sq_head] & 0xFFFFFFFF
            if not waiting and words[self._cq_tail] - words[self._cq_head] & 0xFFFFFFFF >= count:
                return

    def settle(self) -> None:
        """Withdraw reads that were not submitted, and wait for all others, even if interrupts arrive during the wait.

        ``ended`` reports none of these reads. Only the counters in the rings are used, which an interrupt cannot make
        wrong.
        """
        words = self._words
        while len({words[index] for index in (self._sq_tail, self._sq_head, self._cq_tail, self._cq_head)}) > 1:
            try:
                words[self._sq_tail] = words[self._sq_head]
                self._wait(words[self._sq_head] - words[self._cq_head] & 0xFFFFFFFF)
                words[self._cq_head] = words[self._cq_tail]
            except KeyboardInterrupt:
                continue
        self._running.clear()

    def close(self) -> None:
        """Wait for running reads and release the ring. Later calls have no effect.

        The ring is also closed when the last reference to it goes.
        """
        if self._end.alive:
            if os.getpid() == self._process:  # a forked process shares the queues with its parent
                self.settle()
            self._end()

    def __del__(self) -> None:
        if hasattr(self, "_end"):
            self.close()


def _free(fd: int, views: list[memoryview], maps: list[mmap.mmap]) -> None:
    for view in reversed(views):
        view.release()
    for mapped in maps:
        mapped.close()
    os.close(fd)


def _unavailable(error: OSError) -> NoReturn:
    reasons = {
        errno.ENOSYS: f"this kernel ({platform.release()}) is too old or built without it",
        errno.EINVAL: f"this kernel ({platform.release()}) is too old",
        errno.EPERM: "it is forbidden here, by the container's seccomp profile or kernel.io_uring_disabled",
        errno.EACCES: "it is forbidden here, by the container's seccomp profile or kernel.io_uring_disabled",
        errno.ENOMEM: "the limit of locked memory (ulimit -l) is too low for its queues",
        errno.EMFILE: "too many files are open (ulimit -n)",
    }
    reason = reasons.get(error.errno or 0, error.strerror)
    raise BackendUnavailableError(
        f"io_uring is not available: {reason}; use backend=pread", code="no_io_uring"
    ) from error
