"""Reads of experts: their byte ranges, their rows in memory, and the files that they open."""

import errno
import fcntl
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource, Extent
from flashmoe_mlx.formats.shares import first_extents
from flashmoe_mlx.stores.contract import ExpertReadError, ExpertStoreError
from flashmoe_mlx.stores.limits import CHUNK_MIB

__all__ = [
    "PARTS_AT_ONCE",
    "FileDescriptorCache",
    "Read",
    "check_alignment",
    "check_all_read",
    "chunk_bytes",
    "coalesce",
    "open_for_reading",
    "part_bytes",
    "plan_reads",
    "total_bytes",
]

PARTS_AT_ONCE = 4
"""Simultaneous direct reads if the caller uses each expert as soon as it arrives.

A disk divides its rate among all reads that it knows, so that whole records, read at once, all arrive at the end. Four
reads of 2 MiB keep it busy, and experts arrive one after the other (docs/measurements/2026-11-27-overlap.md).
"""
_PART = 2**21
"""Largest read in bytes in that case."""
_MIB = 2**20
_PAGE = 4096
"""Alignment of addresses, offsets, and lengths for direct I/O in bytes; some disks and filesystems need only 512."""
_READ_CODES = {
    errno.ENOENT: "no_such_file",
    errno.EMFILE: "too_many_open_files",
    errno.ENFILE: "too_many_open_files",
    errno.EOPNOTSUPP: "no_direct_reads",
}
"""Error codes by error number; every other error number gets "read_failed"."""
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
        """Return the error to raise for a failure of this read in ``layer``.

        ``args[0]`` of an EOFError is the first byte of the file that is missing.
        """
        if isinstance(error, EOFError):
            reason = "the file ends here, in the middle of the expert"
            return ExpertReadError(self.path, layer, self.expert, error.args[0], reason, code="file_ends_early")
        reason = error.strerror or str(error)
        code = _READ_CODES.get(error.errno or 0)
        return ExpertReadError(self.path, layer, self.expert, self.offset, reason, code=code)


def plan_reads(
    source: ExpertSource,
    layer: int,
    wanted: Sequence[tuple[int, memoryview]],
    chunk_bytes: int | None,
    done: Mapping[int, int] | None = None,
) -> Iterator[Read]:
    """Yield the reads that load experts of ``layer`` into rows of memory; adjacent extents become one read.

    Args:
        source: the location of the experts.
        layer: a valid layer.
        wanted: pairs of an expert and its row, the writable bytes of a slot.
        chunk_bytes: maximum size of a read; None for no limit.
        done: the bytes at the beginning of the records of some experts that need no read.
    """
    for expert, row in wanted:
        place, skipped = 0, (done or {}).get(expert, 0)
        for extent in coalesce(source.extents(layer, expert)):
            step = chunk_bytes or extent.nbytes
            for start in range(max(0, skipped - place), extent.nbytes, step):
                end = min(start + step, extent.nbytes)
                yield Read(expert, extent.path, extent.offset + start, row[place + start : place + end])
            place += extent.nbytes


def total_bytes(reads: Iterable[Read]) -> int:
    """Return the sum of the lengths of ``reads``."""
    return sum(len(read.view) for read in reads)


def check_all_read(layer: int, planned: int, done: int) -> None:
    """Raise ExpertStoreError, code "lost_read", unless ``done`` equals ``planned``, the bytes to read in ``layer``."""
    if done != planned:
        raise ExpertStoreError(
            f"layer {layer}: {done} of {planned} bytes were read although no read failed; this is a bug, "
            "please report it",
            code="lost_read",
        )


def chunk_bytes(chunk_mib: float | None) -> int | None:
    """Convert a chunk size from MiB to bytes, rounded down to a multiple of 4 KiB, as direct I/O needs.

    Raises:
        InputError: ``chunk_mib`` is outside the range ``CHUNK_MIB`` (code "option_out_of_range").
    """
    if chunk_mib is None:
        return None
    CHUNK_MIB.check("chunk_mib", chunk_mib)
    return int(chunk_mib * _MIB) // _PAGE * _PAGE


def part_bytes(chunk: int | None) -> int:
    """Return the maximum size of a read if experts are used as they arrive; ``chunk`` is the user's maximum."""
    return min(chunk or _PART, _PART)


def coalesce(extents: Sequence[Extent]) -> list[Extent]:
    """Join extents that follow each other both in their file and in ``extents``."""
    joined: list[Extent] = []
    for extent in extents:
        last = joined[-1] if joined else None
        if last is not None and (last.path, last.offset + last.nbytes) == (extent.path, extent.offset):
            joined[-1] = Extent(last.path, last.offset, last.nbytes + extent.nbytes)
        else:
            joined.append(extent)
    return joined


def open_for_reading(path: Path, direct: bool = False, readahead: bool = True) -> int:
    """Open a file for reading and return its descriptor.

    Args:
        path: the file.
        direct: whether reads bypass the page cache: with O_DIRECT on Linux, with F_NOCACHE on macOS, which still uses
            pages that are already cached.
        readahead: whether the system may read beyond the requested bytes.

    Raises:
        OSError: the file cannot be opened, or its filesystem does not support direct reads (EOPNOTSUPP).
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
            reason = "this filesystem does not support direct reads; set backend.direct=false"
            raise OSError(errno.EOPNOTSUPP, reason) from error
        raise
    if not readahead:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return fd


def check_alignment(source: ExpertSource) -> None:
    """Raise InputError, code "not_aligned", unless ``source`` is aligned for direct reads, as packs are."""
    extents = first_extents(source)
    if any(extent.offset % _PAGE or extent.nbytes % _PAGE for extent in extents):
        raise InputError(
            f"backend.direct=true: {extents[0].path} is not aligned to {_PAGE} bytes, as direct reads require; "
            "make a pack (task=pack), or set backend.direct=false",
            code="not_aligned",
        )


class FileDescriptorCache:
    """Open file descriptors by path; several threads may share one cache.

    ``close`` closes all descriptors. They are also closed when the last reference to the cache goes.

    Args:
        opener: opens a path at its first use and returns the descriptor.
    """

    def __init__(self, opener: Callable[[Path], int]) -> None:
        self._opener = opener
        self._files: dict[Path, int] = {}
        weakref.finalize(self, _close_all, self._files)

    def __getitem__(self, path: Path) -> int:
        """Return the descriptor of ``path``; raise OSError if the file cannot be opened."""
        fd = self._files.get(path)
        if fd is None:
            fd = self._opener(path)
            # Another thread may have opened the file meanwhile; keep one of the two descriptors.
            if self._files.setdefault(path, fd) != fd:
                os.close(fd)
                fd = self._files[path]
        return fd

    def close(self) -> None:
        """Close all descriptors. Later calls have no effect."""
        _close_all(self._files)


def _close_all(files: dict[Path, int]) -> None:
    while files:
        os.close(files.popitem()[1])
