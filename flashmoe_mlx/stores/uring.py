"""A ring of io_uring, which takes many reads in one system call.

``ctypes`` calls the interface of the kernel (``linux/io_uring.h``, io_uring(7), io_uring_enter(2)) and releases the
interpreter's lock during system calls. Only one thread at a time may use a ring. The last read of every batch ends
before ``io_uring_enter`` returns, so on any processor the writes of the kernel come before the reads of this process.
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
    contains ``view``, or None.
    """

    file: int
    offset: int
    view: memoryview
    buffer: int | None = None


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
        self._files = 0
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

    def run(self, reads: Sequence[RingRead]) -> list[int]:
        """Make at most ``entries`` reads; return for each the number of bytes read or the negated error number.

        After this method returns or raises an error, nothing is written to the views.
        """
        self._settle()  # an interrupt may have ended the previous call of it
        results = [-errno.EIO] * len(reads)  # for reads without an answer of the kernel
        try:
            tail = self._words[self._sq_tail]
            for index, read in enumerate(reads):
                self._prepare(tail + index & self._sq_mask, index, read)
            self._words[self._sq_tail] = tail + len(reads) & 0xFFFFFFFF
            self._wait(len(reads))
            head = self._words[self._cq_head]
            for index in range(len(reads)):
                place = (head + index & self._cq_mask) * _CQE.size
                user_data, result, _ = _CQE.unpack_from(self._cqes, place)
                results[user_data] = result
            self._words[self._cq_head] = head + len(reads) & 0xFFFFFFFF
        except BaseException:
            self._settle()
            raise
        return results

    def _prepare(self, place: int, number: int, read: RingRead) -> None:
        opcode, buffer = (_OP_READ, 0) if read.buffer is None else (_OP_READ_FIXED, read.buffer)
        _SQE.pack_into(
            self._sqes,
            place * _SQE.size,
            *(opcode, self._flags, 0, read.file, read.offset, address_of(read.view), len(read.view), 0, number),
            *(buffer, 0, 0, 0, 0),
        )

    def _wait(self, count: int) -> None:
        """Submit the entries of the submission queue and wait until ``count`` reads have ended."""
        words = self._words
        while True:
            waiting = words[self._sq_tail] - words[self._sq_head] & 0xFFFFFFFF
            ended = words[self._cq_tail] - words[self._cq_head] & 0xFFFFFFFF
            if not waiting and ended >= count:
                return
            try:
                self._call(_ENTER, self._fd, waiting, count, _ENTER_GETEVENTS)
            except OSError as error:
                # EINTR: a signal. EAGAIN, EBUSY: the kernel has no room until some reads have ended.
                if error.errno not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                    raise

    def _settle(self) -> None:
        """Withdraw reads that were not submitted, and wait for all others, even if interrupts arrive during the wait.

        Only the counters in the rings are used; an interrupt cannot make them wrong.
        """
        words = self._words
        while len({words[index] for index in (self._sq_tail, self._sq_head, self._cq_tail, self._cq_head)}) > 1:
            try:
                words[self._sq_tail] = words[self._sq_head]
                self._wait(words[self._sq_head] - words[self._cq_head] & 0xFFFFFFFF)
                words[self._cq_head] = words[self._cq_tail]
            except KeyboardInterrupt:
                continue

    def close(self) -> None:
        """Wait for running reads and release the ring. Later calls have no effect.

        The ring is also released when the last reference to it goes, since ``run`` leaves no read running.
        """
        if self._end.alive:
            self._settle()
            self._end()


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
