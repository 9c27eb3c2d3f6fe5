"""Overwriting slots in a GPU's memory gives the same array as the reference, which makes a new one."""

import gpu_on_cpu
import mlx.core as mx
import numpy as np
import pytest
from systems import needs_linux

from flashmoe_mlx.custom_kernels.fill_slots import begin_filling_slots, finish_filling_slots, reference
from flashmoe_mlx.stores.libc import address_of
from flashmoe_mlx.stores.pinned import PinnedRows


def random_bytes(seed: int, count: int, size: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, 256, (count, size), np.uint8))


def test_the_reference_overwrites_the_given_rows() -> None:
    slots = [4, 0]
    slab, records = random_bytes(0, 5, 32), random_bytes(1, 3, 32)
    expected = np.array(slab)
    expected[slots] = np.array(records)[:2]
    filled = reference.fill_slots(slab, records, mx.array(slots, mx.int32))
    np.testing.assert_array_equal(np.array(filled), expected)
    assert not np.array_equal(np.array(slab), expected)


def check_in_place(slots: tuple[int, ...], size: int) -> None:
    """Copy records from separate memory, in two calls, and compare the slots with the reference."""
    slab, records = random_bytes(0, 7, size), random_bytes(1, 4, size)
    slab = slab + mx.array(0, mx.uint8)  # the output of an operation is in the memory of the GPU
    expected = np.array(reference.fill_slots(slab, records, mx.array(slots, mx.int32)))
    mx.eval(slab)
    memory, (page,) = PinnedRows(4, size), PinnedRows(1, 4096).rows([0])
    table = np.frombuffer(page, np.int64).reshape(-1, 2)
    for entry, (slot, row) in enumerate(zip(slots, memory.rows(range(len(slots))), strict=True)):
        row[:] = np.array(records[entry]).tobytes()
        table[3 + entry] = address_of(row), slot
    jobs = mx.array([address_of(page), 0, 0, 0], mx.int64) + 0
    begun = [begin_filling_slots(slab, jobs, 3, 1)]
    if len(slots) > 1:
        begun.append(begin_filling_slots(slab, jobs, 4, len(slots) - 1))
    finish_filling_slots(begun)
    np.testing.assert_array_equal(np.array(slab * 1), expected)


CASES = [(0,), (6, 2), (3, 1, 0, 5)]


@needs_linux
@pytest.mark.parametrize("slots", CASES)
@pytest.mark.parametrize("size", [16, 4096, 32768])
def test_the_kernel_on_a_cpu(slots: tuple[int, ...], size: int) -> None:
    with gpu_on_cpu.cuda():
        check_in_place(slots, size)


@pytest.mark.cuda
@pytest.mark.parametrize("slots", CASES)
@pytest.mark.parametrize("size", [16, 4096, 32768, 7_077_888])
def test_in_place_equals_the_reference(slots: tuple[int, ...], size: int) -> None:
    check_in_place(slots, size)
