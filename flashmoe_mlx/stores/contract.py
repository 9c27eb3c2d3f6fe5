"""The contract between the engine and the stores in ``backends/``.

The engine asks a store for the experts that the router of a layer chose, and receives them in the slots of one buffer.
Engine and store share nothing else, so any store can serve any engine, and all stores can be compared fairly.

A batch stays valid until the next ``fetch`` of the same store. The router of layer n+1 depends on the output of layer
n, so once it is evaluated, the kernels of layer n have read their slots. The engine fetches only then, because MLX does
not protect a buffer from being overwritten while a kernel reads it.

A fetch may deliver in parts: the engine passes ``arrived``, and computes with the experts that the store holds while
the store reads the missing experts.

A store that holds all experts of a layer in memory that MLX reads in place may also offer them as a whole, with
``in_memory``. The choice of the router then stays on the GPU, and no layer waits for the host. The engine tells the
store later, with ``note_use``, which experts it used, so that the counters are those of a fetch.
"""

import operator
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from threading import Lock, get_ident
from types import TracebackType
from typing import ClassVar, Self, SupportsIndex

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.record import LayerLayouts
from flashmoe_mlx.formats.shares import Share, count_served, not_owned, share_of
from flashmoe_mlx.stores.delivery import Arrived, Delivery, ExpertBatch, LayerInMemory
from flashmoe_mlx.stores.limits import SLOTS, Limit

__all__ = [
    "BackendUnavailableError",
    "ExpertReadError",
    "ExpertRequestError",
    "ExpertStore",
    "ExpertStoreError",
    "OnMisses",
    "StoreClosedError",
    "StoreStats",
]


class ExpertStoreError(FlashMoeError):
    """Base class of the errors of stores."""

    default_code = "store_failed"


class ExpertRequestError(ExpertStoreError):
    """A request for a layer or expert that does not exist, or for more experts than the store has slots."""

    default_code = "invalid_request"


class StoreClosedError(ExpertStoreError):
    """A call to a store after ``close``, or from another process."""

    default_code = "store_closed"


class BackendUnavailableError(ExpertStoreError):
    """A store that this machine cannot run; the message says why."""

    default_code = "backend_unavailable"


class ExpertReadError(ExpertStoreError):
    """A failed read of an expert.

    Stores create this error with ``stores.reads.Read.failed``, which sets codes such as "no_such_file",
    "too_many_open_files", and "file_ends_early"; docs/errors.md lists them.

    Args:
        path: the file.
        layer: the layer of the expert.
        expert: the index of the expert in its layer.
        offset: the byte of the file at which the read failed.
        reason: the message of the operating system.
        code: a more specific code than "read_failed".
    """

    default_code = "read_failed"

    def __init__(
        self, path: Path, layer: int, expert: int, offset: int, reason: str, *, code: str | None = None
    ) -> None:
        super().__init__(f"cannot read layer {layer} expert {expert}: {path} at byte {offset}: {reason}", code=code)
        self.path = path
        self.layer = layer
        self.expert = expert
        self.offset = offset
        self.reason = reason


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counters of a store since it was opened; every store has the same counters.

    A fetch that fails is not counted. Hints change only ``fetch_seconds``, ``prefetched``, and ``bytes_wasted``.

    Attributes:
        fetches: successful calls of ``fetch``.
        requests: requested experts, each counted once per fetch; the sum of ``hits`` and ``misses``.
        hits: requested experts that were already in a slot.
        misses: requested experts that had to be read.
        evictions: experts that lost their slot to another expert.
        reads: reads of storage or page cache that served a fetch.
        bytes_read: bytes of these reads.
        fetch_seconds: wall time inside ``fetch``, without the time in ``arrived``.
        prefetched: misses whose read a hint had started before the fetch.
        bytes_wasted: bytes that were read because of hints and that no fetch used.
        sampled_bytes: bytes of fetched experts, in whole pages, that were looked up in the page cache before their
            read; a sample of ``bytes_read``, left out of comparisons of two counters.
        sampled_cached_bytes: those of ``sampled_bytes`` that were in the page cache.
        overlapped_seconds: wall time that the caller spent in ``arrived`` while further experts were being read.
    """

    fetches: int = 0
    requests: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    reads: int = 0
    bytes_read: int = 0
    fetch_seconds: float = 0.0
    prefetched: int = 0
    bytes_wasted: int = 0
    sampled_bytes: int = field(default=0, compare=False)
    sampled_cached_bytes: int = field(default=0, compare=False)
    overlapped_seconds: float = 0.0

    @property
    def page_cache_hit_rate(self) -> float | None:
        """Share of the bytes read that were in the page cache before, from the sample; None without a sample."""
        return self.sampled_cached_bytes / self.sampled_bytes if self.sampled_bytes else None

    @property
    def io_hidden(self) -> float | None:
        """Share of the time of fetches that the caller spent computing while further experts were being read.

        It leaves out reads that a hint started and that ended before their fetch. None if nothing was read.
        """
        seconds = self.fetch_seconds + self.overlapped_seconds
        return self.overlapped_seconds / seconds if self.misses and seconds else None

    def __add__(self, other: "StoreStats") -> "StoreStats":
        return StoreStats(*(getattr(self, name) + getattr(other, name) for name in _COUNTERS))

    def __sub__(self, other: "StoreStats") -> "StoreStats":
        return StoreStats(*(getattr(self, name) - getattr(other, name) for name in _COUNTERS))


_COUNTERS = tuple(counter.name for counter in fields(StoreStats))  # every fetch adds them


OnMisses = Callable[[int, tuple[int, ...]], object]
"""Receives a layer and experts that were not in memory. It must not call the store."""


class ExpertStore(ABC):
    """Base class of stores, which serve the records of experts.

    A subclass implements ``_load``, which brings experts into memory, ``_release``, which frees all resources, and, if
    it can use hints, ``_prefetch``. A subclass that can hold all experts of a layer also implements ``_in_memory``.
    This class checks and counts requests and passes them on one at a time. All public methods may be called from any
    thread.

    Args:
        source: the location of the experts.
        slots: maximum number of distinct experts in one fetch.
    """

    limits: ClassVar[Mapping[str, Limit]] = {"slots": SLOTS}
    """Ranges of the numeric options of the constructor, by option; ``create_store`` checks them."""
    reads: ClassVar[bool] = True
    """Whether a fetch may have to read; the engine then fetches many experts in groups, and hints each group before."""

    def __init__(self, source: ExpertSource, slots: int) -> None:
        SLOTS.check("slots", slots)
        self.source = source
        self.share: Share | None = share_of(source)
        """The experts that this store serves, where several nodes share the experts; None for all."""
        self.slots = slots
        self._stats = StoreStats()
        self._closed = False
        self._lock = Lock()
        self.on_misses: OnMisses | None = None
        """Receives the layer and the missing experts of each successful fetch that missed some, inside the fetch."""
        self._fetching: int | None = None
        """The thread whose fetch is running."""
        self._process = os.getpid()

    @property
    def layout(self) -> LayerLayouts:
        """The layout of the records of each layer; a slot has room for the largest record."""
        return self.source.layout

    def fetch(
        self, layer: SupportsIndex, experts: Sequence[SupportsIndex], arrived: Arrived | None = None
    ) -> ExpertBatch:
        """Load ``experts`` of ``layer`` into slots, and return them when all of them are there.

        Args:
            layer: index of the layer.
            experts: indices of the experts; an index may repeat.
            arrived: called in this thread, first with the experts that need no read, possibly none, when all other
                experts are being read, then with further experts as they arrive: once with each distinct expert. A
                store that cannot deliver in parts calls it once, with all. It must not call the store. The fetch
                raises its errors.

        Raises:
            ExpertRequestError: an index is not an integer or out of range, or there are more distinct experts than
                slots (codes "index_no_integer", "index_out_of_range", "too_many_experts"); or another node owns an
                expert ("expert_of_another_node"); or ``arrived`` called the store ("call_during_fetch").
            ExpertReadError: the storage failed; the store remains usable.
            StoreClosedError: the store was closed, or opened by another process.
        """
        start = time.perf_counter()
        layer, indices = self._checked(layer, experts)
        if self.share is not None and (others := not_owned(self.share, layer, self.source.num_experts, indices)):
            raise ExpertRequestError(
                f"layer {layer} expert {others[0]} belongs to another node", code="expert_of_another_node"
            )
        distinct = len(set(indices))
        if distinct > self.slots:
            raise ExpertRequestError(
                f"{distinct} experts were requested at once, but the store has {self.slots} slots",
                code="too_many_experts",
            )
        self._refuse_other_process()
        delivery = Delivery(arrived, distinct)
        with self._lock:
            self._refuse_closed()
            self._fetching = get_ident()
            try:
                batch, done = self._load(layer, indices, delivery)
                delivery.finish(indices, batch)
            finally:
                self._fetching = None
            if done.misses and self.on_misses is not None:
                self.on_misses(layer, delivery.missing or tuple(dict.fromkeys(indices)))
            seconds = time.perf_counter() - start - delivery.seconds
            requests, overlapped = done.hits + done.misses, delivery.overlapped
            self._stats += replace(
                done, fetches=1, requests=requests, fetch_seconds=seconds, overlapped_seconds=overlapped
            )
        return batch

    def prefetch(self, layer: SupportsIndex, experts: Sequence[SupportsIndex]) -> None:
        """Hint that ``experts`` of ``layer``, most likely first, may be fetched soon.

        A hint never changes the results of ``fetch``. Only the latest hint counts: a store may cancel the reads that an
        earlier hint started. Experts of other nodes are left out.

        Raises:
            ExpertRequestError: an index is out of range or not an integer.
            StoreClosedError: the store was closed, or opened by another process.
        """
        layer, indices = self._checked(layer, experts)
        if self.share is not None and (others := not_owned(self.share, layer, self.source.num_experts, indices)):
            indices = [expert for expert in indices if expert not in others]
        self._refuse_other_process()
        with self._lock:
            self._refuse_closed()
            self._prefetch(layer, indices)

    def in_memory(self, layer: SupportsIndex) -> LayerInMemory | None:
        """Return all experts of ``layer``, or None if the store does not hold them in memory that MLX reads in place.

        The rows keep their experts until the store is closed: no later call refills them. The store returns the same
        object each time. A use of these experts counts only if it is reported to ``note_use``. Where several nodes
        share the experts, these are the experts of this node.

        Raises:
            ExpertRequestError: the layer is out of range or not an integer.
            StoreClosedError: the store was closed, or opened by another process.
        """
        layer = _index(layer, self.source.num_layers, "layer")
        self._refuse_other_process()
        with self._lock:
            self._refuse_closed()
            return self._in_memory(layer)

    def note_use(self, layers: Sequence[int], experts: npt.NDArray[np.integer]) -> None:
        """Count one fetch of each of ``layers``, of experts that were used by way of ``in_memory``: all of them hits.

        Args:
            layers: L indices of layers.
            experts: [L, N], indices of the experts used in each layer; an index may repeat. Experts of other nodes do
                not count.

        Raises:
            ExpertRequestError: an index is out of range.
            StoreClosedError: the store was closed, or opened by another process.
        """
        for layer in layers:
            _index(layer, self.source.num_layers, "layer")
        for extreme in (experts.min(initial=0), experts.max(initial=0)):
            _index(int(extreme), self.source.num_experts, "expert")
        hits = count_served(self.source, layers, experts)
        self._refuse_other_process()
        with self._lock:
            self._refuse_closed()
            self._stats += StoreStats(fetches=len(layers), requests=hits, hits=hits)

    def stats(self) -> StoreStats:
        """Counters since the store was opened."""
        return self._stats

    def close(self) -> None:
        """Wait for a running fetch, then free files, threads, and slots. Later calls have no effect."""
        if os.getpid() != self._process:
            return  # the resources belong to the process that opened the store
        self._refuse_call_during_fetch()
        with self._lock:
            if not self._closed:
                self._closed = True
                self._release()

    @abstractmethod
    def _load(self, layer: int, experts: Sequence[int], delivery: Delivery) -> tuple[ExpertBatch, StoreStats]:
        """Load ``experts`` of ``layer``, and return the batch with the counters of this call.

        The indices are valid but may repeat. The caller sets ``fetches``, ``requests``, and the times. When this method
        raises an error, no thread or kernel may still be writing to a slot.

        Args:
            layer: index of the layer.
            experts: indices of the experts.
            delivery: may be given experts before all have arrived: first the experts that need no read, when all other
                experts are being read, then further experts, each distinct expert once. Without a call, the caller
                passes all experts on at the end. A store that holds a part of the experts sets ``delivery.missing``.
        """

    def _prefetch(self, layer: int, experts: Sequence[int]) -> None:  # noqa: B027  # stores may ignore hints
        """Start to read ``experts`` of ``layer``, whose indices are valid but may repeat; never wait for storage."""

    def _in_memory(self, layer: int) -> LayerInMemory | None:  # noqa: ARG002  # few stores hold a whole layer
        """Return all experts of ``layer``, whose index is valid, or None; see ``in_memory``."""
        return None

    @abstractmethod
    def _release(self) -> None:
        """Free all resources; called once, while no fetch is running."""

    def _checked(self, layer: SupportsIndex, experts: Sequence[SupportsIndex]) -> tuple[int, list[int]]:
        indices = [_index(expert, self.source.num_experts, "expert") for expert in experts]
        return _index(layer, self.source.num_layers, "layer"), indices

    def _refuse_other_process(self) -> None:
        # Checked before the lock is taken: in a forked process, a thread of the parent may hold the lock forever.
        if os.getpid() != self._process:
            raise StoreClosedError(
                "this store was opened by another process; open one in this process", code="store_of_another_process"
            )
        self._refuse_call_during_fetch()

    def _refuse_call_during_fetch(self) -> None:
        if self._fetching == get_ident():  # it would wait for itself
            raise ExpertRequestError(
                "the store was called while it delivers experts of a fetch; call it after the fetch",
                code="call_during_fetch",
            )

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StoreClosedError("this store is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _index(value: SupportsIndex, count: int, name: str) -> int:
    if isinstance(value, bool):
        raise ExpertRequestError(f"{name} {value!r} is not an integer", code="index_no_integer")
    try:
        index = operator.index(value)
    except TypeError:
        raise ExpertRequestError(f"{name} {value!r} is not an integer", code="index_no_integer") from None
    if not 0 <= index < count:
        raise ExpertRequestError(
            f"{name} {index} is out of range: there are {count}, counted from 0", code="index_out_of_range"
        )
    return index
