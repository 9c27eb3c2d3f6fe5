"""An emulation of slots in the memory of an NVIDIA GPU: the reference of ``fill_slots`` replaces the kernel.

A machine without a GPU then runs every branch of the stores for GPUs. The staging area holds NaN before and after each
filling, so a record that is written to a wrong row leaves NaN in a slot.
"""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.custom_kernels.fill_slots import reference
from flashmoe_mlx.stores import gpu_slots, memory, slots
from flashmoe_mlx.stores.filling import Filling

NAN = 0xFF
"""A byte whose repetition is NaN in every float type."""


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stores that are opened later keep their slots as on a GPU."""
    monkeypatch.setattr(memory, "slots_on_gpu", lambda: True)
    monkeypatch.setattr(memory, "free_gpu_memory", memory.total_memory)
    monkeypatch.setattr(gpu_slots, "fill_slots", fill_in_place)
    monkeypatch.setattr(slots, "StagingArea", PoisonedStagingArea)


def fill_in_place(slab: mx.array, records: mx.array, rows: mx.array) -> None:
    """Write ``records`` into ``slab`` in place, as the kernel does, then fill ``records`` with NaN."""
    filled = np.array(reference.fill_slots(slab, records, rows))
    np.asarray(memoryview(slab))[:] = filled
    np.asarray(memoryview(records))[:] = NAN


class PoisonedStagingArea(gpu_slots.StagingArea):
    """A staging area that holds NaN until a record is written to it."""

    def fill(self, array: mx.array, slots: list[int]) -> Filling:
        self._slab.host[:] = bytes([NAN]) * self._slab.host.nbytes
        return super().fill(array, slots)
