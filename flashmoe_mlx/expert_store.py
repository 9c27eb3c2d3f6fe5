"""The contract between the engine and the stores in ``backends/``.

The engine asks a store for the experts that a layer's router chose and gets them in the slots of one buffer. Nothing
else passes between the two, so any store can serve any engine and all stores can be compared fairly.

When a slot may be refilled: a batch stays valid until the next ``fetch`` of the same store. Layer n+1's router depends
on layer n's output, so its evaluation proves that layer n's kernels have read their slots; the engine fetches only
then. MLX itself protects no buffer from being overwritten while a kernel reads it.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, SupportsIndex

import mlx.core as mx

from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.pack.record import RecordLayout


class ExpertStoreError(FlashMoeError):
    """Base of everything that a store raises."""


class ExpertRequestError(ExpertStoreError):
    """A layer or expert that does not exist, or more experts than the store has slots."""


class StoreClosedError(ExpertStoreError):
    """A store used after ``close``."""


class BackendUnavailableError(ExpertStoreError):
    """A store that this machine cannot run, and why."""


class ExpertReadError(ExpertStoreError):
    """Reading an expert failed; says of which layer and expert, and at which byte of which file."""

    def __init__(self, path: Path, layer: int, expert: int, offset: int, reason: str) -> None:
        super().__init__(f"cannot read layer {layer} expert {expert}: {path} at byte {offset}: {reason}")
        self.path, self.layer, self.expert, self.offset, self.reason = path, layer, expert, offset, reason


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes at ``offset`` of a file."""

    path: Path
    offset: int
    nbytes: int


class ExpertSource(Protocol):
    """Where the bytes of experts lie: a variant of a pack, or a published checkpoint."""

    @property
    def layout(self) -> RecordLayout: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def num_experts(self) -> int: ...

    def extents(self, layer: int, expert: int) -> Sequence[Extent]:
        """The expert's bytes in the order of its record: one extent in a pack, several in a checkpoint."""
        ...


@dataclass(frozen=True, slots=True)
class ExpertBatch:
    """Experts in memory, valid until the next ``fetch`` of the store that returned them.

    ``slab`` is the buffer as an array, uint8 [slots, record bytes], and ``host`` the same bytes as the CPU sees them.
    ``slots[i]`` is the row that holds the i-th expert asked for.
    """

    slab: mx.array
    host: memoryview
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store has done since it was opened; the same counters for every store.

    ``requests`` = experts asked for (an expert named twice in a fetch counts once) = ``hits`` (already in a slot)
    + ``misses`` (had to be read). ``reads`` and ``bytes_read`` count reads of storage or page cache, ``fetch_seconds``
    the wall time that callers spent inside ``fetch``.
    """

    fetches: int = 0
    requests: int = 0
    hits: int = 0
    misses: int = 0
    reads: int = 0
    bytes_read: int = 0
    fetch_seconds: float = 0.0

    def __add__(self, other: "StoreStats") -> "StoreStats":
        return StoreStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: "StoreStats") -> "StoreStats":
        return StoreStats(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class ExpertStore(ABC):
    """Serves expert records from ``source``.

    ``slots`` is the number of distinct experts that one ``fetch`` can hold.
    """

    def __init__(self, source: ExpertSource, slots: int) -> None:
        if slots < 1:
            raise InputError(f"slots={slots}: a store needs at least 1 slot")
        self.source = source
        self.slots = slots

    @property
    def layout(self) -> RecordLayout:
        """The layout of every record in the batches."""
        return self.source.layout

    @abstractmethod
    def fetch(self, layer: int, experts: Sequence[SupportsIndex]) -> ExpertBatch:
        """Bring ``experts`` of ``layer`` into slots; blocks until they are there.

        Raises:
            ExpertRequestError: an index is out of range or not an integer, or there are more experts than slots.
            ExpertReadError: the storage failed.
            StoreClosedError: the store was closed.
        """

    def prefetch(self, layer: int, experts: Sequence[SupportsIndex]) -> None:  # noqa: B027  # ignoring it is the default
        """Hint that ``experts`` of ``layer`` may be fetched soon; never changes what ``fetch`` returns."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """Counters since the store was opened."""

    @abstractmethod
    def close(self) -> None:
        """Free files, threads and slots after pending reads have ended; may be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def checked_request(self, layer: SupportsIndex, experts: Sequence[SupportsIndex]) -> tuple[int, list[int]]:
        """``layer`` and ``experts`` as ints, every one in range and no more distinct experts than slots."""
        layer = _index(layer, self.source.num_layers, "layer")
        indices = [_index(expert, self.source.num_experts, "expert") for expert in experts]
        distinct = len(set(indices))
        if distinct > self.slots:
            raise ExpertRequestError(f"{distinct} experts were asked for at once, but the store has {self.slots} slots")
        return layer, indices


def _index(value: SupportsIndex, count: int, what: str) -> int:
    if isinstance(value, bool):
        raise ExpertRequestError(f"{what} {value!r} is not an integer")
    try:
        index = operator.index(value)
    except TypeError:
        raise ExpertRequestError(f"{what} {value!r} is not an integer") from None
    if not 0 <= index < count:
        raise ExpertRequestError(f"{what} {index} is out of range: there are {count}, counted from 0")
    return index
