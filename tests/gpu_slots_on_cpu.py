"""Slots of an NVIDIA GPU, emulated: the real classes, with the reference of ``fill_slots`` in place of the kernel.

A machine without a GPU then takes every branch of the stores that one with a GPU takes. Memory in which records arrive
holds NaN before and after each filling, so a record that goes to a wrong row there leaves NaN in a slot.
"""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.custom_kernels.fill_slots import reference
from flashmoe_mlx.stores import gpu_slots, memory, slots
from flashmoe_mlx.stores.filling import Filling

NAN = 0xFF
"""Of such bytes alone, every float of any width is NaN."""


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have stores that are opened from now on keep slots as on a GPU."""
    monkeypatch.setattr(memory, "slots_on_gpu", lambda: True)
    monkeypatch.setattr(memory, "free_gpu_memory", memory.total_memory)
    monkeypatch.setattr(gpu_slots, "fill_slots", fill_in_place)
    monkeypatch.setattr(slots, "StagingArea", PoisonedStagingArea)


def fill_in_place(slab: mx.array, records: mx.array, rows: mx.array) -> None:
    """Do what the kernel does, which writes to the array that it is given; then poison ``records``."""
    filled = np.array(reference.fill_slots(slab, records, rows))
    np.asarray(memoryview(slab))[:] = filled
    np.asarray(memoryview(records))[:] = NAN


class PoisonedStagingArea(gpu_slots.StagingArea):
    """StagingArea that hold NaN until a record is written to them."""

    def fill(self, array: mx.array, slots: list[int]) -> Filling:
        self._slab.host[:] = bytes([NAN]) * self._slab.host.nbytes
        return super().fill(array, slots)
