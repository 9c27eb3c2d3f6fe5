"""The share of the bytes of a store's reads that the page cache held before, measured on a sample of the requests."""

import contextlib
import mmap
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.contract import StoreStats
from flashmoe_mlx.stores.page_cache import cached_range
from flashmoe_mlx.stores.reads import FileDescriptorCache, coalesce, open_for_reading

_SHARE = 0.005
"""Share of the wall time that samples may take."""


class PageCacheSampler:
    """A lookup of experts in the page cache before they are read.

    A sample is one expert of a request, both chosen at random, as often as 0.5 % of the wall time allows.

    Args:
        source: the location of the experts.
    """

    def __init__(self, source: ExpertSource) -> None:
        self._source = source
        self._files = FileDescriptorCache(open_for_reading)
        self._random = np.random.default_rng(0)
        self._step = 1
        """The mean number of requests from one sample to the next."""
        self._skip = 0
        self._requests = self._samples = 0
        self._began = perf_counter()
        self._spent = 0.0
        self._known = True
        self._open: set[int] = set()
        """Layers whose files are open."""

    def sample(self, layer: int, experts: Sequence[int]) -> StoreStats:
        """Look up one of ``experts`` of ``layer``, if this request is in the sample.

        Call this method before the experts are read. It raises no error: the read will report any trouble with files.

        Returns:
            The counters ``sampled_bytes`` and ``sampled_cached_bytes``.
        """
        if not experts or not self._known:
            return StoreStats()
        self._requests += 1
        if layer not in self._open:
            self._open_files(layer, experts[0])
        if self._skip:
            self._skip -= 1
            return StoreStats()
        start = perf_counter()
        found = self._look_up(layer, experts[int(self._random.integers(len(experts)))])
        now = perf_counter()
        self._spent += now - start
        self._samples += 1
        cost, per_request = self._spent / self._samples, (now - self._began) / self._requests
        # The first requests say little about the time between requests, so the step grows slowly.
        self._step = min(1 + int(cost / (_SHARE * per_request)), 2 * self._step)
        self._skip = int(self._random.integers(2 * self._step - 1))
        return found

    def _open_files(self, layer: int, expert: int) -> None:
        """Open the files of a layer at its first request, as the readers do, rather than at some later request.

        An interrupt could lose a descriptor while it is opened; so can only the first request of a layer.
        """
        with contextlib.suppress(OSError):  # no such file, or too many open files
            for extent in self._source.extents(layer, expert):
                self._files[extent.path]
        self._open.add(layer)

    def _look_up(self, layer: int, expert: int) -> StoreStats:
        total = cached = 0
        for extent in coalesce(self._source.extents(layer, expert)):
            start = extent.offset // mmap.PAGESIZE * mmap.PAGESIZE
            nbytes = extent.offset + extent.nbytes - start
            try:
                found = cached_range(extent.path, self._files[extent.path], start, nbytes)
            except OSError:  # no such file, or too many open files
                return StoreStats()
            if found is None:
                self._known = False
                return StoreStats()
            total += -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            cached += found
        return StoreStats(sampled_bytes=total, sampled_cached_bytes=cached)

    def close(self) -> None:
        """Close the files. Later calls have no effect."""
        self._files.close()
