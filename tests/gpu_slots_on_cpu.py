"""An emulation of slots in the memory of an NVIDIA GPU, and of the copy engine that fills them.

A machine without a GPU then runs every branch of the stores for GPUs. ``LateCopies`` replaces NVIDIA's driver: it
copies when the store waits, and not before. If a store hands out a record too early, the record is NaN; if it writes to
memory whose copy has not ended, an assertion fails. Where the driver refuses, the reference of ``fill_slots`` replaces
the kernel. Memory on the way to the GPU holds NaN before and after each filling, so a record that is written to a wrong
row leaves NaN in a slot.
"""

import ctypes
import threading
from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.backends import mmap
from flashmoe_mlx.custom_kernels.fill_slots import reference
from flashmoe_mlx.stores import gpu_slots, memory, reading_store, staging
from flashmoe_mlx.stores.copy_engine import CopyEngine, CopyEngineError
from flashmoe_mlx.stores.filling import Filling
from flashmoe_mlx.stores.libc import address_of

NAN = 0xFF
"""A byte whose repetition is NaN in every float type."""


class LateCopies:
    """A copy engine that copies as late as possible."""

    def __init__(self, launches: Counter[str]) -> None:
        self.launches = launches
        """Counts copies as "copy_engine"."""
        self.pinned: dict[int, int] = {}
        """The size of each pinned range by its address."""
        self.waits = 0
        """The number of waits for at least one copy."""
        self._copies: list[tuple[int, int, bytes]] = []
        self._lock = threading.Lock()

    def pin(self, address: int, nbytes: int) -> None:
        ctypes.memset(address, NAN, nbytes)
        self.pinned[address] = nbytes

    def unpin(self, address: int) -> None:
        self.wait()
        del self.pinned[address]

    def begin_copy(self, target: int, source: memoryview) -> None:
        address = address_of(source)
        if not any(start <= address < start + size for start, size in self.pinned.items()):
            raise CopyEngineError("the memory is not pinned")
        with self._lock:
            ctypes.memset(target, NAN, source.nbytes)
            self._copies.append((target, address, bytes(source)))
            self.launches["copy_engine"] += 1

    def wait(self) -> None:
        with self._lock:
            copies, self._copies = self._copies, []
            self.waits += bool(copies)
            for target, address, expected in copies:
                assert ctypes.string_at(address, len(expected)) == expected, "written to during its copy"
                ctypes.memmove(target, address, len(expected))
            for _, address, expected in copies:
                ctypes.memset(address, NAN, len(expected))


def emulate(monkeypatch: pytest.MonkeyPatch, refuses: bool = False) -> LateCopies:
    """Make stores that are opened later keep their slots as on a GPU; ``refuses`` makes the driver pin nothing."""
    monkeypatch.setattr(memory, "slots_on_gpu", lambda: True)
    monkeypatch.setattr(memory, "free_gpu_memory", memory.total_memory)
    for module in (reading_store, mmap):
        monkeypatch.setattr(module, "slots_on_gpu", lambda: True)
    return use_late_copies(monkeypatch, refuses)


def use_late_copies(
    monkeypatch: pytest.MonkeyPatch, refuses: bool = False, launches: Counter[str] | None = None
) -> LateCopies:
    """Replace the driver, and the kernel for memory that it does not pin."""
    engine = LateCopies(Counter() if launches is None else launches)
    found: CopyEngine | None = None if refuses else engine
    for module in (staging, reading_store, mmap):
        monkeypatch.setattr(module, "copy_engine", lambda: found)
    monkeypatch.setattr(gpu_slots, "address_on_gpu", lambda array: address_of(memoryview(array).cast("B")))
    monkeypatch.setattr(staging, "fill_slots", fill_in_place)
    original = staging.StagingArea.fill

    def fill(self: staging.StagingArea, array: mx.array, address: int | None, slots: Sequence[int]) -> Filling:
        filling = original(self, array, address, slots)
        for row in self.rows(range(self.count)):
            row[:] = bytes([NAN]) * row.nbytes
        return filling

    monkeypatch.setattr(staging.StagingArea, "fill", fill)
    return engine


def fill_in_place(slab: mx.array, records: mx.array, rows: mx.array) -> None:
    """Write ``records`` into ``slab`` in place, as the kernel does, then fill ``records`` with NaN."""
    filled = np.array(reference.fill_slots(slab, records, rows))
    np.asarray(memoryview(slab))[:] = filled
    np.asarray(memoryview(records))[:] = NAN
