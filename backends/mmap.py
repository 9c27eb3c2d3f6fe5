"""The pack mapped into memory: the operating system loads pages, and nothing is copied unless MLX needs a copy."""

import contextlib
import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource, Extent
from flashmoe_mlx.stores.contract import ExpertBatch, ExpertStore, StoreStats
from flashmoe_mlx.stores.host_slots import HostBatch
from flashmoe_mlx.stores.reads import OpenFiles, Read
from flashmoe_mlx.stores.slab import Slab

_ADVICE = {"normal": "MADV_NORMAL", "random": "MADV_RANDOM", "sequential": "MADV_SEQUENTIAL"}
_MADV_POPULATE_READ = 22  # <asm-generic/mman-common.h>, Linux 5.14; Python 3.11 has no name for it


class MmapStore(ExpertStore):
    """Serves experts from a mapping of the layer files.

    Kernels of the CPU read the mapping itself (``batch.host``), and so do Metal's where they take single records
    (``batch.records``); ``batch.slab``, and everything for MLX on other devices, is copied when it is asked for.

    The fused kernels take a slab, so on Metal they are given a copy. A layer's whole mapping as the slab would spare
    it, but Metal makes a buffer resident as a whole: 3.6 GB at the 397B's geometry for ten experts of 7 MB. A buffer
    for each record, ten more arguments of a kernel, would do; it has not been tried, since no Mac is at hand to
    measure it on.

    Options: ``slots`` of one fetch; ``advice`` to the system for the whole mapping: normal, random or sequential;
    ``populate`` has a fetch wait until its experts are in memory, all of them read at once, in place of page faults
    under the kernels.

    A file that was truncated is an error, not a SIGBUS: sizes are compared before any page is touched, and on Linux
    5.14 or later ``populate`` also reports a failing disk. Without it, or on other systems, a disk that fails under a
    kernel ends the process.
    """

    def __init__(self, source: ExpertSource, slots: int = 16, advice: str = "normal", populate: bool = True) -> None:
        super().__init__(source, slots)
        if advice not in _ADVICE:
            raise InputError(f"backend.advice={advice}: choose from {', '.join(_ADVICE)}", code="unknown_advice")
        extents = source.extents(0, 0)
        if len(extents) != 1:
            raise InputError(
                f"backend=mmap needs a pack, where an expert lies in one piece; in {extents[0].path.parent} it has "
                f"{len(extents)}. Make one (task=pack), or use backend=checkpoint",
                code="not_a_pack",
            )
        self._advice = getattr(mmap, _ADVICE[advice])
        self._populate = populate
        self._files = OpenFiles(_open)
        self._mappings: dict[Path, _Mapping] = {}
        self._slab = Slab(slots, source.layout.record_bytes)

    def _bring(self, layer: int, experts: Sequence[int]) -> tuple[ExpertBatch, StoreStats]:
        distinct = list(dict.fromkeys(experts))
        extents = {expert: self.source.extents(layer, expert)[0] for expert in distinct}
        mappings = {expert: self._mapping(layer, expert, extents[expert]) for expert in distinct}
        if self._populate:
            for expert in distinct:  # first all are begun, then waited for
                mappings[expert].advise(extents[expert], mmap.MADV_WILLNEED)
            for expert in distinct:
                try:
                    mappings[expert].populate(extents[expert])
                except OSError as error:
                    raise _read(expert, extents[expert]).failed(layer, error) from error
        views = {expert: mappings[expert].view(extents[expert]) for expert in distinct}
        slots = {expert: slot for slot, expert in enumerate(distinct)}
        batch = _MappedBatch(
            tuple(slots[expert] for expert in experts), [views[expert].data for expert in experts], lambda _: self._slab
        )
        nbytes = sum(extent.nbytes for extent in extents.values())
        return batch, StoreStats(misses=len(distinct), reads=len(distinct), bytes_read=nbytes)

    def _mapping(self, layer: int, expert: int, extent: Extent) -> "_Mapping":
        """Return a mapping of the extent's file up to its current end."""
        try:
            fd = self._files[extent.path]
            size = os.fstat(fd).st_size
            if size < extent.offset + extent.nbytes:
                raise EOFError(max(size, extent.offset))
            mapping = self._mappings.get(extent.path)
            if mapping is None or mapping.nbytes < extent.offset + extent.nbytes:
                mapping = self._mappings[extent.path] = _Mapping(fd, size, self._advice)
        except (EOFError, OSError) as error:
            raise _read(expert, extent).failed(layer, error) from error
        return mapping

    def _hint(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            extent = self.source.extents(layer, expert)[0]
            mapping = self._mappings.get(extent.path)
            if mapping is not None:
                mapping.advise(extent, mmap.MADV_WILLNEED)

    def _release(self) -> None:
        # A batch that is still held keeps its mapping, and so its memory stays valid; the files are closed.
        self._mappings.clear()
        self._files.close()


def _read(expert: int, extent: Extent) -> Read:
    return Read(expert, extent.path, extent.offset, memoryview(b""))


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class _Mapping:
    """A whole file, mapped for reading and unmapped with the last reference."""

    def __init__(self, fd: int, nbytes: int, advice: int) -> None:
        # Metal takes memory for a buffer only if it could be written to; private pages never reach the file.
        access = mmap.ACCESS_COPY if mx.metal.is_available() else mmap.ACCESS_READ
        self._map = mmap.mmap(fd, nbytes, access=access)
        self._map.madvise(advice)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self.nbytes = nbytes

    def view(self, extent: Extent) -> npt.NDArray[np.uint8]:
        return self._bytes[extent.offset : extent.offset + extent.nbytes]

    def advise(self, extent: Extent, advice: int) -> None:
        """Give the system a hint, which may fail."""
        self._madvise(extent, advice)

    def populate(self, extent: Extent) -> None:
        """Wait until the pages are in memory; OSError if the storage fails or the file has become too short."""
        if sys.platform != "linux":
            return
        while (code := self._madvise(extent, _MADV_POPULATE_READ)) in (errno.EINTR, errno.EAGAIN):
            pass
        if code not in (0, errno.EINVAL):  # EINVAL: a kernel before 5.14, which reads when pages are touched
            raise OSError(code, "the pages cannot be read (I/O error, or the file was cut short)")

    def _madvise(self, extent: Extent, advice: int) -> int:
        """The error number, or 0. Through ctypes, which lets other threads run meanwhile."""
        address = self._bytes.ctypes.data + extent.offset
        result = _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(extent.nbytes), advice)
        return ctypes.get_errno() if result else 0


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class _MappedBatch(HostBatch):
    """An ``ExpertBatch`` of a mapping; memory that MLX cannot use in place is copied once."""

    @cached_property
    def records(self) -> list[mx.array]:
        if mx.metal.is_available():
            with contextlib.suppress(ValueError):  # memory that Metal does not take
                return [mx.asarray(np.frombuffer(view, np.uint8), copy=False) for view in self._views]
        return super().records
