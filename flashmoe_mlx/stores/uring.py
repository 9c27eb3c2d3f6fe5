"""io_uring: many reads handed to Linux in one system call.

Bound to the kernel's own interface (``linux/io_uring.h``, io_uring(7), io_uring_enter(2)) through ``ctypes``, which
lets go of the interpreter lock during system calls. A ring is used by one thread at a time. Every batch of reads is
waited for to the last one inside ``io_uring_enter``, so what the kernel has written is ordered before what is read
here, on any processor.
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
from flashmoe_mlx.stores.libc import address_of

# System calls have these numbers on every architecture that got them after they were unified (all but Alpha).
_SETUP, _ENTER, _REGISTER = 425, 426, 427
_SQ_RING, _SQES = 0, 0x1000_0000  # what to map
_SETUP_CLAMP = 1 << 4
_FEATURES = 1 << 0 | 1 << 3  # one mapping for both rings, and (RW_CUR_POS) Linux 5.6, which has plain reads
_ENTER_GETEVENTS = 1 << 0
_REGISTER_BUFFERS, _REGISTER_FILES, _REGISTER_FILES_UPDATE = 0, 2, 6
_OP_READ_FIXED, _OP_READ = 4, 22
_SQE_FIXED_FILE, _SQE_ASYNC = 1 << 0, 1 << 4

_PARAMS = struct.Struct("<5I2I3I 8IQ 8IQ")  # struct io_uring_params
_SQE = struct.Struct("<BBHiQQIIQHHiQQ")  # struct io_uring_sqe, of a read
_CQE = struct.Struct("<QiI")  # struct io_uring_cqe
_FILES = 1024
"""Most files that can be registered with a ring."""


@dataclass(frozen=True, slots=True)
class RingRead:
    """A read that fills ``view`` from ``offset`` of the registered file ``file``.

    ``buffer`` is the registered buffer that ``view`` lies in, or None.
    """

    file: int
    offset: int
    view: memoryview
    buffer: int | None = None


class Ring:
    """A ring for at most ``entries`` simultaneous reads; with ``workers``, threads of the kernel make them.

    Without ``workers`` a read of what is in the page cache is made by the caller, within the system call.

    Raises:
        BackendUnavailableError: the system has no io_uring, or forbids it here.
    """

    def __init__(self, entries: int, workers: bool) -> None:
        if sys.platform != "linux":
            raise BackendUnavailableError("io_uring exists on Linux alone; use backend=pread", code="no_io_uring")
        self._libc = ctypes.CDLL(None, use_errno=True)
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
            # The kernel takes descriptors for registered files, with holes to be filled later.
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
        for index in range(sq_entries):  # each place of the queue always names the entry of the same number
            words[array // 4 + index] = index

    def _mapped(self, what: int, size: int) -> memoryview:
        mapped = mmap.mmap(self._fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=what)
        self._maps.append(mapped)
        view = memoryview(mapped)
        self._views.append(view)
        return view

    def _call(self, number: int, *arguments: int | bytearray) -> int:
        words = [a if isinstance(a, int) else address_of(a) for a in (*arguments, 0, 0)]
        result = int(self._libc.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, words)))
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result

    def register_file(self, fd: int) -> int:
        """Register the open file ``fd``, which the ring keeps open; return its number for reads."""
        slot = self._files
        if slot == _FILES:
            raise OSError(errno.EMFILE, f"more than {_FILES} files")
        value = bytearray(struct.pack("<i", fd))
        update = bytearray(struct.pack("<IIQ", slot, 0, address_of(value)))  # struct io_uring_files_update
        self._call(_REGISTER, self._fd, _REGISTER_FILES_UPDATE, update, 1)
        self._files += 1
        return slot

    def register_buffers(self, buffers: Sequence[memoryview]) -> None:
        """Pin ``buffers``, each up to 1 GiB; reads name them by index. Raises OSError if the system refuses."""
        vectors = bytearray(
            struct.pack(f"<{2 * len(buffers)}Q", *(n for b in buffers for n in (address_of(b), len(b))))
        )
        self._call(_REGISTER, self._fd, _REGISTER_BUFFERS, vectors, len(buffers))

    def run(self, reads: Sequence[RingRead]) -> list[int]:
        """Make at most ``entries`` ``reads``; return the bytes read of each, or its negated error number.

        After this returns or raises, no view is written to.
        """
        self._settle()  # after an interrupt that hit the settling itself
        results = [-errno.EIO] * len(reads)  # of a read that the kernel does not answer for
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
                # EINTR: a signal. EAGAIN, EBUSY: the kernel lacks room for more until some have ended.
                if error.errno not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                    raise

    def _settle(self) -> None:
        """Withdraw entries that were not submitted, and wait for the rest, however often the wait is interrupted.

        The kernel's own counters say how much there is, so no interrupt can make them wrong.
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
        """Wait for running reads and release the ring; may be called again.

        The end of the last reference releases the ring too: ``run`` leaves no read running.
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
