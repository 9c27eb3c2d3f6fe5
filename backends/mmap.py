"""The pack mapped into memory: the system loads the pages, and bytes are copied only where MLX needs a copy."""

import contextlib
import errno
import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource, Extent
from flashmoe_mlx.formats.shares import first_extents
from flashmoe_mlx.stores.contract import ExpertStore, StoreStats
from flashmoe_mlx.stores.delivery import Delivery, ExpertBatch
from flashmoe_mlx.stores.host_slots import HostBatch
from flashmoe_mlx.stores.libc import MADV_POPULATE_READ, madvise
from flashmoe_mlx.stores.memory import check_memory, slots_on_gpu
from flashmoe_mlx.stores.mirrors import MirroredExperts
from flashmoe_mlx.stores.page_cache_sampler import PageCacheSampler
from flashmoe_mlx.stores.reads import FileDescriptorCache, Read
from flashmoe_mlx.stores.slab import Slab
from flashmoe_mlx.stores.slots import SlotMaker, Slots
from flashmoe_mlx.stores.thread_reader import ThreadReader

_THREADS = 8
"""Threads that copy experts for a GPU; one copies at 6 GB/s, eight at 24 GB/s."""
_ADVICE = {"normal": "MADV_NORMAL", "random": "MADV_RANDOM", "sequential": "MADV_SEQUENTIAL"}


class MmapStore(ExpertStore):
    """A store that serves experts from a mapping of the layer files.

    CPU kernels read the mapping itself (``batch.host``), and so do Metal kernels that take single records
    (``batch.records``). MLX operations and kernels on other devices get a copy (``batch.slab``). For an NVIDIA GPU,
    threads copy each expert into memory from which the GPU fetches it.

    The fused Metal kernels take a slab, so they get a copy too. The whole mapping of a layer could be their slab, but
    Metal makes a buffer resident as a whole: 3.6 GB at the 397B geometry for ten experts of 7 MB. One buffer for each
    record, as ten more arguments of the kernel, would avoid the copy; nobody has measured that on a Mac yet.

    If a file was truncated, a fetch raises an error, and no SIGBUS ends the process: sizes are compared before any
    page is touched, and on Linux 5.14 or later ``populate`` also reports a failing disk. Without ``populate``, or on
    other systems, a disk that fails while a kernel reads the mapping ends the process.

    Args:
        source: the location of the experts; each must be in one piece, as in a pack.
        slots: maximum number of distinct experts in one fetch.
        advice: expected pattern of access to the whole mapping: "normal", "random", or "sequential".
        populate: whether a fetch reads all its experts at once and waits for them; otherwise kernels wait for one page
            fault after another.

    Raises:
        InputError: ``advice`` is unknown (code "unknown_advice"), experts are in several pieces ("not_a_pack"), or the
            pack has mirrors ("contradiction").
    """

    def __init__(self, source: ExpertSource, slots: int = 16, advice: str = "normal", populate: bool = True) -> None:
        super().__init__(source, slots)
        if advice not in _ADVICE:
            raise InputError(f"backend.advice={advice}: choose from {', '.join(_ADVICE)}", code="unknown_advice")
        if isinstance(source, MirroredExperts):
            raise InputError(
                "backend=mmap reads one folder: remove backend.mirrors, or choose another backend", code="contradiction"
            )
        extents = first_extents(source)
        if len(extents) > 1:
            raise InputError(
                f"backend=mmap needs a pack, in which each expert is in one piece; in {extents[0].path.parent} an "
                f"expert has {len(extents)} pieces. Make a pack (task=pack), or use backend=checkpoint",
                code="not_a_pack",
            )
        self._advice = getattr(mmap, _ADVICE[advice])
        self._populate = populate
        self._files = FileDescriptorCache(_open)
        self._sampler = PageCacheSampler(source)
        self._mappings: dict[Path, _Mapping] = {}
        self._on_gpu: Slots | None = None
        if slots_on_gpu():
            check_memory(f"{slots} slots", slots * source.layout.record_bytes, "choose fewer slots")
            self._on_gpu = SlotMaker(source.layout.record_bytes, slots).make(slots)
            self._copier = _Copier(source, self._mappings, populate)
        else:
            self._slab = Slab(slots, source.layout.record_bytes)

    def _load(self, layer: int, experts: Sequence[int], delivery: Delivery) -> tuple[ExpertBatch, StoreStats]:
        distinct = list(dict.fromkeys(experts))
        extents = {expert: self.source.extents(layer, expert)[0] for expert in distinct}
        mappings = {expert: self._mapping(layer, expert, extents[expert]) for expert in distinct}
        sampled = self._sampler.sample(layer, distinct)
        if self._populate:
            for expert in distinct:  # start all reads before waiting for the first
                mappings[expert].advise(extents[expert], mmap.MADV_WILLNEED)
        if self._on_gpu is not None:
            batch, done = self._load_on_gpu(self._on_gpu, layer, experts, distinct, delivery)
            return batch, sampled + done
        views = {expert: mappings[expert].view(extents[expert]) for expert in distinct}
        if self._populate:
            delivery.deliver([], lambda: self._batch([], views))  # the system reads in the meantime
            for expert in distinct:
                try:
                    mappings[expert].populate(extents[expert])
                except OSError as error:
                    raise _as_read(expert, extents[expert]).failed(layer, error) from error
                delivery.deliver([expert], partial(self._batch, [expert], views))
        batch = self._batch(experts, views)
        nbytes = sum(extent.nbytes for extent in extents.values())
        return batch, replace(sampled, misses=len(distinct), reads=len(distinct), bytes_read=nbytes)

    def _batch(self, experts: Sequence[int], views: Mapping[int, npt.NDArray[np.uint8]]) -> "_MappedBatch":
        slots = {expert: slot for slot, expert in enumerate(dict.fromkeys(experts))}
        return _MappedBatch(
            tuple(slots[expert] for expert in experts), [views[expert].data for expert in experts], lambda _: self._slab
        )

    def _load_on_gpu(
        self, on_gpu: Slots, layer: int, experts: Sequence[int], distinct: Sequence[int], delivery: Delivery
    ) -> tuple[ExpertBatch, StoreStats]:
        places = {expert: slot for slot, expert in enumerate(distinct)}
        filling = on_gpu.fill(list(places.values()))

        def ready(arrived: Sequence[int]) -> None:
            filling.arrived([places[expert] for expert in arrived])
            delivery.deliver(arrived, lambda: on_gpu.batch([places[expert] for expert in arrived]))

        try:
            wanted = [(expert, filling.rows[slot]) for expert, slot in places.items()]
            begun = partial(delivery.deliver, [], lambda: on_gpu.batch([]))
            reads, nbytes = self._copier.read(layer, wanted, ready, begun)
        except BaseException:
            filling.give_up()
            raise
        filling.commit()
        batch = on_gpu.batch([places[expert] for expert in experts])
        return batch, StoreStats(misses=len(distinct), reads=reads, bytes_read=nbytes)

    def _mapping(self, layer: int, expert: int, extent: Extent) -> "_Mapping":
        """Return a mapping of the file of ``extent`` up to its current end."""
        try:
            fd = self._files[extent.path]
            size = os.fstat(fd).st_size
            if size < extent.offset + extent.nbytes:
                raise EOFError(max(size, extent.offset))
            mapping = self._mappings.get(extent.path)
            if mapping is None or mapping.nbytes < extent.offset + extent.nbytes:
                mapping = self._mappings[extent.path] = _Mapping(fd, size, self._advice)
        except (EOFError, OSError) as error:
            raise _as_read(expert, extent).failed(layer, error) from error
        return mapping

    def _prefetch(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            extent = self.source.extents(layer, expert)[0]
            mapping = self._mappings.get(extent.path)
            if mapping is not None:
                mapping.advise(extent, mmap.MADV_WILLNEED)

    def _release(self) -> None:
        # A batch that is still referenced keeps its mapping alive, so its memory stays valid.
        if self._on_gpu is not None:
            self._copier.close()
            self._on_gpu = None
        self._mappings.clear()
        self._files.close()
        self._sampler.close()


def _as_read(expert: int, extent: Extent) -> Read:
    return Read(expert, extent.path, extent.offset, memoryview(b""))


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class _Mapping:
    """A whole file, mapped for reading; unmapped when the last reference goes."""

    def __init__(self, fd: int, nbytes: int, advice: int) -> None:
        # Metal makes buffers only of writable memory. Private pages never reach the file.
        access = mmap.ACCESS_COPY if mx.metal.is_available() else mmap.ACCESS_READ
        self._map = mmap.mmap(fd, nbytes, access=access)
        self._map.madvise(advice)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self.nbytes = nbytes

    def view(self, extent: Extent) -> npt.NDArray[np.uint8]:
        return self._bytes[extent.offset : extent.offset + extent.nbytes]

    def advise(self, extent: Extent, advice: int) -> None:
        """Advise the system about the pages of ``extent``; it may ignore that."""
        madvise(self._address(extent), extent.nbytes, advice)

    def populate(self, extent: Extent) -> None:
        """Wait until the pages of ``extent`` are in memory.

        Raises:
            OSError: the storage failed, or the file is now too short.
        """
        if sys.platform != "linux":
            return
        code = errno.EAGAIN
        while code in (errno.EINTR, errno.EAGAIN):
            code = madvise(self._address(extent), extent.nbytes, MADV_POPULATE_READ)
        if code not in (0, errno.EINVAL):  # EINVAL: a kernel before 5.14, which reads pages when they are touched
            raise OSError(code, "the pages cannot be read (I/O error, or the file was truncated)")

    def _address(self, extent: Extent) -> int:
        return self._bytes.ctypes.data + extent.offset


class _Copier(ThreadReader):
    """Threads that copy experts from ``mappings`` instead of reading their files."""

    def __init__(self, source: ExpertSource, mappings: "Mapping[Path, _Mapping]", populate: bool) -> None:
        super().__init__(source, _THREADS)
        self._mappings = mappings
        self._populate = populate

    def _fill(self, read: Read) -> int:
        mapping, extent = self._mappings[read.path], Extent(read.path, read.offset, len(read.view))
        if self._populate:
            mapping.populate(extent)
        np.copyto(np.frombuffer(read.view, np.uint8), mapping.view(extent))
        return 1


class _MappedBatch(HostBatch):
    """An ``ExpertBatch`` of mapped experts; they are copied once if MLX cannot use the mapping in place."""

    @cached_property
    def records(self) -> list[mx.array]:
        if mx.metal.is_available():
            with contextlib.suppress(ValueError):  # memory that Metal refuses
                return [mx.asarray(np.frombuffer(view, np.uint8), copy=False) for view in self._views]
        return super().records
