"""Plan reads: map experts to byte ranges of files and to rows in memory."""

import errno
import fcntl
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource, Extent
from flashmoe_mlx.stores.contract import ExpertReadError, ExpertStoreError
from flashmoe_mlx.stores.limits import CHUNK_MIB

_MIB = 2**20
_PAGE = 4096
"""Alignment of addresses, offsets and lengths for direct I/O; some disks and filesystems need only 512."""
_READ_CODES = {
    errno.ENOENT: "no_such_file",
    errno.EMFILE: "too_many_open_files",
    errno.ENFILE: "too_many_open_files",
    errno.EOPNOTSUPP: "no_direct_reads",
}
"""Codes of failed reads whose remedy is known; "read_failed" for any other error number."""
# <sys/fcntl.h> of macOS; Python names only some of them, and only in newer versions.
_F_RDAHEAD, _F_NOCACHE = 45, 48


@dataclass(frozen=True, slots=True)
class Read:
    """A read that fills ``view`` from ``offset`` of the file at ``path``, for ``expert``."""

    expert: int
    path: Path
    offset: int
    view: memoryview

    def failed(self, layer: int, error: OSError | EOFError) -> ExpertReadError:
        """Return the error to raise when this read failed; an EOFError holds the byte at which the file ended."""
        if isinstance(error, EOFError):
            reason = "the file ends here, in mid-record"
            return ExpertReadError(self.path, layer, self.expert, error.args[0], reason, code="file_ends_early")
        reason = error.strerror or str(error)
        code = _READ_CODES.get(error.errno or 0)
        return ExpertReadError(self.path, layer, self.expert, self.offset, reason, code=code)


def plan_reads(
    source: ExpertSource, layer: int, wanted: Sequence[tuple[int, memoryview]], chunk_bytes: int | None
) -> Iterator[Read]:
    """Yield reads that fill the row of each (expert, row): one for each run of adjacent extents, in pieces of at most
    ``chunk_bytes``.
    """
    for expert, row in wanted:
        done = 0
        for extent in coalesced(source.extents(layer, expert)):
            step = chunk_bytes or extent.nbytes
            for start in range(0, extent.nbytes, step):
                end = min(start + step, extent.nbytes)
                yield Read(expert, extent.path, extent.offset + start, row[done + start : done + end])
            done += extent.nbytes


def total_bytes(reads: Iterable[Read]) -> int:
    """Return the sum of the lengths of ``reads``."""
    return sum(len(read.view) for read in reads)


def check_all_read(layer: int, planned: int, done: int) -> None:
    """Raise ExpertStoreError, code "lost_read", unless ``done`` equals the ``planned`` bytes of ``layer``."""
    if done != planned:
        raise ExpertStoreError(
            f"layer {layer}: {done} of {planned} bytes were read, and no read failed; this is a fault of the program, "
            "please report it",
            code="lost_read",
        )


def chunk_bytes(chunk_mib: float | None) -> int | None:
    """Convert a chunk size to bytes, rounded down to a multiple of 4 KiB, which direct I/O needs.

    Raises:
        InputError: it is not a number in the range of ``CHUNK_MIB``.
    """
    if chunk_mib is None:
        return None
    CHUNK_MIB.check("chunk_mib", chunk_mib)
    return int(chunk_mib * _MIB) // _PAGE * _PAGE


def coalesced(extents: Sequence[Extent]) -> list[Extent]:
    """Join extents that are adjacent both in their file and in memory."""
    joined: list[Extent] = []
    for extent in extents:
        last = joined[-1] if joined else None
        if last is not None and (last.path, last.offset + last.nbytes) == (extent.path, extent.offset):
            joined[-1] = Extent(last.path, last.offset, last.nbytes + extent.nbytes)
        else:
            joined.append(extent)
    return joined


def open_for_reading(path: Path, direct: bool = False, readahead: bool = True) -> int:
    """Open ``path`` and return its descriptor.

    ``direct`` reads past the page cache: O_DIRECT on Linux, F_NOCACHE on macOS, which still uses cached pages. Without
    ``readahead`` the system is told not to read beyond each request.

    Raises:
        OSError: the file cannot be opened, or its filesystem has no direct reads.
    """
    if sys.platform != "linux":
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if sys.platform == "darwin":
            fcntl.fcntl(fd, _F_NOCACHE, int(direct))
            fcntl.fcntl(fd, _F_RDAHEAD, int(readahead))
        return fd
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    except OSError as error:
        if direct and error.errno == errno.EINVAL:
            raise OSError(errno.EOPNOTSUPP, "this filesystem has no direct reads; set direct=false") from error
        raise
    if not readahead:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return fd


def check_alignment(source: ExpertSource) -> None:
    """Raise InputError unless ``source`` is aligned for direct reads, as packs are."""
    extents = source.extents(0, 0)
    if any(extent.offset % _PAGE or extent.nbytes % _PAGE for extent in extents):
        raise InputError(
            f"direct=true: {extents[0].path} is not aligned to {_PAGE} bytes, as direct reads need it; "
            "make a pack (task=pack), or set direct=false",
            code="not_aligned",
        )


class FileDescriptorCache:
    """Descriptors by path, opened by ``opener`` at the first request; several threads may share it.

    ``close`` closes them, and so does the end of the last reference to this object.
    """

    def __init__(self, opener: Callable[[Path], int]) -> None:
        self._opener = opener
        self._files: dict[Path, int] = {}
        weakref.finalize(self, _close_all, self._files)

    def __getitem__(self, path: Path) -> int:
        """Return the descriptor of ``path``; raise OSError if it cannot be opened."""
        fd = self._files.get(path)
        if fd is None:
            fd = self._opener(path)
            # Another thread may have opened it meanwhile; one descriptor stays.
            if self._files.setdefault(path, fd) != fd:
                os.close(fd)
                fd = self._files[path]
        return fd

    def close(self) -> None:
        """Close all descriptors. May be called again."""
        _close_all(self._files)


def _close_all(files: dict[Path, int]) -> None:
    while files:
        os.close(files.popitem()[1])
