"""The contract between the engine and the stores in ``backends/``.

The engine asks a store for the experts that a layer's router chose and gets them in the slots of one buffer. Nothing
else passes between the two, so any store can serve any engine and all stores can be compared fairly.

When a slot may be refilled: a batch stays valid until the next ``fetch`` of the same store. Layer n+1's router depends
on layer n's output, so its evaluation proves that layer n's kernels have read their slots; the engine fetches only
then. MLX itself protects no buffer from being overwritten while a kernel reads it.
"""

import operator
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import ClassVar, Protocol, Self, SupportsIndex

import mlx.core as mx

from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.record import RecordLayout
from flashmoe_mlx.stores.limits import SLOTS, Limit


class ExpertStoreError(FlashMoeError):
    """Base of everything that a store raises."""

    default_code = "store_failed"


class ExpertRequestError(ExpertStoreError):
    """A layer or expert that does not exist, or more experts than the store has slots."""

    default_code = "invalid_request"


class StoreClosedError(ExpertStoreError):
    """A store used after ``close``, or in another process."""

    default_code = "store_closed"


class BackendUnavailableError(ExpertStoreError):
    """A store that this machine cannot run, and why."""

    default_code = "backend_unavailable"


class ExpertReadError(ExpertStoreError):
    """A failed read of an expert; names the layer and expert, the file and the byte.

    ``reason`` is the message of the operating system. Stores make this error with ``stores.reads.Read.failed``,
    which gives codes such as "no_such_file", "too_many_open_files" or "file_ends_early"; see docs/errors.md.
    """

    default_code = "read_failed"

    def __init__(
        self, path: Path, layer: int, expert: int, offset: int, reason: str, *, code: str | None = None
    ) -> None:
        super().__init__(f"cannot read layer {layer} expert {expert}: {path} at byte {offset}: {reason}", code=code)
        self.path, self.layer, self.expert, self.offset, self.reason = path, layer, expert, offset, reason


class ExpertBatch(Protocol):
    """Experts in memory, valid until the next ``fetch`` of the store that returned them.

    Three views of the same bytes, for whichever a kernel wants; a store makes the ones that cost it a copy only when
    they are asked for. All in the order of the request.
    """

    @property
    def slots(self) -> tuple[int, ...]:
        """The row of ``slab`` that holds each expert."""
        ...

    @property
    def slab(self) -> mx.array:
        """One buffer with all of them, uint8 [rows, record bytes]."""
        ...

    @property
    def records(self) -> Sequence[mx.array]:
        """Each expert by itself, uint8 [record bytes]."""
        ...

    @property
    def host(self) -> Sequence[memoryview]:
        """Each expert as the CPU sees it, ``record bytes`` of format "B"; for reading alone."""
        ...


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store has done since it was opened; the same counters for every store.

    ``requests`` = experts asked for (an expert named twice in a fetch counts once) = ``hits`` (already in a slot)
    + ``misses`` (had to be read). ``evictions`` = experts that lost their slot to another. ``reads`` and ``bytes_read``
    count reads of storage or page cache that served a fetch, ``fetch_seconds`` the wall time that callers spent inside
    ``fetch``. A fetch that fails counts nothing.

    Hints change none of these but the time: ``prefetched`` of the misses were read, or being read, because of a hint,
    and ``bytes_wasted`` were read because of hints, and no fetch wanted them.
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

    def __add__(self, other: "StoreStats") -> "StoreStats":
        return StoreStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: "StoreStats") -> "StoreStats":
        return StoreStats(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class ExpertStore(ABC):
    """Serves expert records from ``source``; ``slots`` is the number of distinct experts that one ``fetch`` can hold.

    A subclass says how experts come into memory (``_bring``), what there is to free (``_release``) and, if it can make
    use of it, what a hint does (``_hint``). Requests are checked, counted and taken one at a time here. All methods may
    be called from any thread.
    """

    limits: ClassVar[Mapping[str, Limit]] = {"slots": SLOTS}
    """Numbers that options of the constructor accept, by name; checked before the store is opened by its name."""

    def __init__(self, source: ExpertSource, slots: int) -> None:
        SLOTS.check("slots", slots)
        self.source = source
        self.slots = slots
        self._stats = StoreStats()
        self._closed = False
        self._one_at_a_time = Lock()
        self._process = os.getpid()

    @property
    def layout(self) -> RecordLayout:
        """The layout of every record in the batches."""
        return self.source.layout

    def fetch(self, layer: SupportsIndex, experts: Sequence[SupportsIndex]) -> ExpertBatch:
        """Bring ``experts`` of ``layer`` into slots; blocks until they are there.

        Raises:
            ExpertRequestError: an index is out of range or not an integer, or there are more experts than slots.
            ExpertReadError: the storage failed; the store can be used on.
            StoreClosedError: the store was closed, or opened by another process.
        """
        start = time.perf_counter()
        layer, indices = self._checked(layer, experts)
        distinct = len(set(indices))
        if distinct > self.slots:
            raise ExpertRequestError(
                f"{distinct} experts were asked for at once, but the store has {self.slots} slots",
                code="too_many_experts",
            )
        self._refuse_other_process()
        with self._one_at_a_time:
            self._refuse_closed()
            batch, done = self._bring(layer, indices)
            seconds = time.perf_counter() - start
            self._stats += replace(done, fetches=1, requests=done.hits + done.misses, fetch_seconds=seconds)
        return batch

    def prefetch(self, layer: SupportsIndex, experts: Sequence[SupportsIndex]) -> None:
        """Hint that ``experts`` of ``layer`` may be fetched soon, the likeliest first; never changes what is fetched.

        The latest hint counts: a store may drop what an earlier one had begun.

        Raises:
            ExpertRequestError: an index is out of range or not an integer.
            StoreClosedError: the store was closed, or opened by another process.
        """
        layer, indices = self._checked(layer, experts)
        self._refuse_other_process()
        with self._one_at_a_time:
            self._refuse_closed()
            self._hint(layer, indices)

    def stats(self) -> StoreStats:
        """Counters since the store was opened."""
        return self._stats

    def close(self) -> None:
        """Wait for the fetch under way, then free files, threads and slots; may be called again."""
        if os.getpid() != self._process:
            return  # what there is to free belongs to the process that opened it
        with self._one_at_a_time:
            if not self._closed:
                self._closed = True
                self._release()

    @abstractmethod
    def _bring(self, layer: int, experts: Sequence[int]) -> tuple[ExpertBatch, StoreStats]:
        """Load ``experts`` (validated; may repeat) of ``layer``; returns the batch and this call's counters.

        The caller sets ``fetches``, ``requests`` and ``fetch_seconds``. When this raises, nothing may be written to any
        slot any more.
        """

    def _hint(self, layer: int, experts: Sequence[int]) -> None:  # noqa: B027  # ignoring it is the default
        """Make use of a hint, without waiting for storage."""

    @abstractmethod
    def _release(self) -> None:
        """Free everything; called once, when no fetch is under way."""

    def _checked(self, layer: SupportsIndex, experts: Sequence[SupportsIndex]) -> tuple[int, list[int]]:
        indices = [_index(expert, self.source.num_experts, "expert") for expert in experts]
        return _index(layer, self.source.num_layers, "layer"), indices

    def _refuse_other_process(self) -> None:
        # Before the lock: another thread of the parent may have held it when this process was forked.
        if os.getpid() != self._process:
            raise StoreClosedError(
                "this store was opened by another process; open one in this process", code="store_of_another_process"
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


def _index(value: SupportsIndex, count: int, what: str) -> int:
    if isinstance(value, bool):
        raise ExpertRequestError(f"{what} {value!r} is not an integer", code="index_no_integer")
    try:
        index = operator.index(value)
    except TypeError:
        raise ExpertRequestError(f"{what} {value!r} is not an integer", code="index_no_integer") from None
    if not 0 <= index < count:
        raise ExpertRequestError(
            f"{what} {index} is out of range: there are {count}, counted from 0", code="index_out_of_range"
        )
    return index
