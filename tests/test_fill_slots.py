"""Overwriting slots in a GPU's memory gives the same array as the reference, which makes a new one."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.custom_kernels.fill_slots import fill_slots, reference


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


@pytest.mark.cuda
@pytest.mark.parametrize("slots", [(0,), (6, 2), (3, 1, 0, 5)])
@pytest.mark.parametrize("size", [16, 4096, 32768, 7_077_888])
def test_in_place_equals_the_reference(slots: tuple[int, ...], size: int) -> None:
    slab, records, rows = random_bytes(0, 7, size), random_bytes(1, 4, size), mx.array(slots, mx.int32)
    slab = slab + mx.array(0, mx.uint8)  # the output of an operation is in the memory of the GPU
    mx.eval(slab)
    expected = np.array(reference.fill_slots(slab, records, rows))
    fill_slots(slab, records, rows)
    np.testing.assert_array_equal(np.array(slab * 1), expected)
