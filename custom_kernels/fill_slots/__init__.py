"""Overwrite slots in a GPU's memory, in place, with records in memory of the CPU.

MLX cannot write into an existing array: an update makes a new array unless nothing else refers to the old one, so a
store would copy gigabytes for every expert. On CUDA a kernel can write to its inputs, and it can read any address that
the driver has made visible to the GPU.

A copy engine could copy as fast without a kernel, but it needs the address of the slots, and MLX moves an array to
other memory when the CPU first accesses it or any view of it.

This folder has no ``OPERATION``: stores call the kernel, not models, and MLX has no implementation to replace it if a
check at load failed. Tests compare it with its reference.
"""

from collections.abc import Sequence
from functools import cache, lru_cache

import mlx.core as mx

from flashmoe_mlx.custom_kernels.fill_slots import reference
from flashmoe_mlx.custom_kernels.kernel import Kernel

__all__ = ["begin_filling_slots", "finish_filling_slots", "reference"]

KERNEL = Kernel(__package__, "body", ["slab", "jobs", "first"], ["written"], in_place=["slab"])
_BLOCK = 256
_BLOCKS_A_RECORD = 64


def begin_filling_slots(slab: mx.array, jobs: mx.array, first: int, count: int) -> mx.array:
    """Begin to overwrite rows of ``slab`` with records, in place, and do not wait; only on CUDA.

    Kernels that are launched later on the same stream read the new records. MLX does not know that this kernel writes
    to ``slab``, and it runs independent kernels of one evaluation side by side. This is therefore an evaluation by
    itself; evaluations of one stream run in turn.

    Args:
        slab: uint8 [rows, record_bytes], where record_bytes is a multiple of 16. All computations that read the rows to
            be overwritten have been launched.
        jobs: int64 [4] in the memory of the GPU, whose first value is the address of a table, int64 [n, 2], that the
            GPU can read: the address of each record, and its row of ``slab``.
        first: index of the first entry of the table to copy.
        count: number of entries to copy, at least 1.

    Returns:
        An array for ``finish_filling_slots``. Until then the records and the entries must not change.
    """
    (written,) = KERNEL(
        [slab, jobs, _length_as_shape(first + 1)], [((1,), mx.uint8)], (_BLOCKS_A_RECORD, count, 1), _BLOCK, {}
    )
    mx.async_eval(written)  # type: ignore[no-untyped-call]
    return written


@lru_cache(maxsize=16)
def _length_as_shape(length: int) -> mx.array:
    """Return ``length`` undefined bytes; the kernel reads only their shape, which is passed at the launch.

    The slice stays lazy, because an evaluation would wait for all earlier work of the device.
    """
    return _ruler(1 << (length - 1).bit_length())[:length]


@cache
def _ruler(room: int) -> mx.array:
    array = mx.zeros((room,), mx.uint8)
    mx.eval(array)
    return array


def finish_filling_slots(begun: Sequence[mx.array] | None) -> None:
    """Wait until all records of ``begun``, results of ``begin_filling_slots``, have been copied; None: all records."""
    if begun is None:
        mx.synchronize()
    else:
        mx.eval(begun)
