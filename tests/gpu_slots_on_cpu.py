"""An emulation of slots in the memory of an NVIDIA GPU: copies begin and end as late as a GPU may run them.

A machine without a GPU then runs every branch of the stores for GPUs. ``LateCopies`` replaces the kernel
``fill_slots``. It copies when the store waits or when somebody uses the slots, and not before, as a kernel does that
follows earlier work. Until then, slots to be filled are NaN. If a store writes to memory whose copy has not ended, an
assertion fails. Memory on the way to the GPU holds NaN before each filling and after each copy, so a record that is
written to a wrong row leaves NaN in a slot.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.backends import mmap, ram_hybrid, resident
from flashmoe_mlx.stores import gpu_slots, memory, pinned, reading_store, staging
from flashmoe_mlx.stores.delivery import LayerInMemory
from flashmoe_mlx.stores.filling import Filling
from flashmoe_mlx.stores.gpu_slots import GpuBatch
from flashmoe_mlx.stores.libc import address_of
from flashmoe_mlx.stores.slots import Slots, whole_layer

NAN = 0xFF
"""A byte whose repetition is NaN in every float type."""


class Memory:
    """A driver that pins everything; pinned memory is NaN at first."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        """The size of each pinned range by its address."""

    def pin(self, address: int, nbytes: int) -> None:
        ctypes.memset(address, NAN, nbytes)
        self.pinned[address] = nbytes

    def unpin(self, address: int) -> None:
        del self.pinned[address]


class LateCopies(Memory):
    """A GPU that copies as late as possible, and its driver."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = 0
        """The number of records whose copies have begun."""
        self.waits = 0
        """The number of waits by a store for at least one copy."""
        self._copies: list[tuple[int, int, bytes, mx.array]] = []

    def begin(self, slab: mx.array, jobs: mx.array, first: int, count: int) -> mx.array:
        """Stand in for ``begin_filling_slots``."""
        size, start = slab.shape[1], address_of(memoryview(slab).cast("B"))  # type: ignore[arg-type]
        table = (ctypes.c_int64 * (2 * (first + count))).from_address(int(np.array(jobs)[0]))
        for entry in range(first, first + count):
            source, slot = table[2 * entry], table[2 * entry + 1]
            assert 0 <= slot < slab.shape[0]
            ctypes.memset(start + slot * size, NAN, size)
            self._copies.append((start + slot * size, source, ctypes.string_at(source, size), slab))
            self.begun += 1
        return mx.array(first)

    def unpin(self, address: int) -> None:
        # Not for other memory: the garbage collector may free some in the middle of anything.
        if any(address <= source < address + self.pinned[address] for _, source, _, _ in self._copies):
            self.flush()
        super().unpin(address)

    def finish(self, begun: Sequence[mx.array] | None) -> None:
        """Stand in for ``finish_filling_slots``."""
        self.waits += 1
        self.flush()

    def flush(self) -> None:
        """Make all copies; after an interrupt the next call repeats them, since no interrupt stops a GPU."""
        for target, source, expected, _ in self._copies:
            assert ctypes.string_at(source, len(expected)) == expected, "written to during its copy"
            ctypes.memmove(target, source, len(expected))
        done, self._copies = self._copies, []
        for _, source, expected, _ in done:
            ctypes.memset(source, NAN, len(expected))


def emulate(monkeypatch: pytest.MonkeyPatch, driver: Memory | None = None) -> LateCopies:
    """Make stores that are opened later keep their slots as on a GPU; ``driver`` replaces that of the result."""
    gpu = LateCopies()
    for module in (memory, reading_store, mmap):
        monkeypatch.setattr(module, "slots_on_gpu", lambda: True)
    monkeypatch.setattr(memory, "free_gpu_memory", memory.total_memory)
    monkeypatch.setattr(pinned, "driver", lambda: driver or gpu)
    monkeypatch.setattr(staging, "begin_filling_slots", gpu.begin)
    monkeypatch.setattr(staging, "finish_filling_slots", gpu.finish)

    class LateBatch(GpuBatch):
        def __getattribute__(self, name: str) -> Any:
            if name in ("slab", "records", "host"):
                gpu.flush()
            return super().__getattribute__(name)

    def late_whole_layer(slots: Slots, table: mx.array) -> LayerInMemory | None:
        gpu.flush()
        return whole_layer(slots, table)

    monkeypatch.setattr(gpu_slots, "GpuBatch", LateBatch)
    for module in (resident, ram_hybrid):
        monkeypatch.setattr(module, "whole_layer", late_whole_layer)
    original = staging.StagingArea.fill

    def fill(self: staging.StagingArea, array: mx.array, slots: Sequence[int]) -> Filling:
        filling = original(self, array, slots)
        for row in self.rows(range(self.count)):
            row[:] = bytes([NAN]) * row.nbytes
        return filling

    monkeypatch.setattr(staging.StagingArea, "fill", fill)
    return gpu
