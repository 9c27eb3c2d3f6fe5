"""Overwrite slots in a GPU's memory, in place, with records in memory of the CPU.

MLX cannot write into an existing array: an update makes a new array unless nothing else refers to the old one, so a
store would copy gigabytes for every expert. On CUDA a kernel can write to its inputs, and it can read any address that
the driver has made visible to the GPU.

A copy engine could copy as fast without a kernel, but it needs the address of the slots, and MLX moves an array to
other memory when the CPU first accesses it or any view of it.

This folder has no ``OPERATION``: stores call the kernel, not models, and MLX has no implementation to replace it if a
check at load failed. Tests compare it with its reference.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import cast

import mlx.core as mx

from flashmoe_mlx.custom_kernels.fill_slots import reference
from flashmoe_mlx.custom_kernels.kernel import length_as_shape

__all__ = ["begin_filling_slots", "finish_filling_slots", "reference"]

_BLOCK = 256
_BLOCKS_A_RECORD = 64

_SOURCE = """
    const long row_words = slab_shape[1] / 16;
    const int64_t* job = reinterpret_cast<const int64_t*>(jobs[0]) + 2 * (first_shape[0] - 1 + blockIdx.y);
    const uint4* from = reinterpret_cast<const uint4*>(job[0]);
    uint4* to = reinterpret_cast<uint4*>(const_cast<uint8_t*>(slab)) + job[1] * row_words;
    const long step = (long)gridDim.x * blockDim.x;
    long word = (long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; word + 3 * step < row_words; word += 4 * step) {
        const uint4 a = from[word];
        const uint4 b = from[word + step];
        const uint4 c = from[word + 2 * step];
        const uint4 d = from[word + 3 * step];
        to[word] = a;
        to[word + step] = b;
        to[word + 2 * step] = c;
        to[word + 3 * step] = d;
    }
    for (; word < row_words; word += step) {
        to[word] = from[word];
    }
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
        written[0] = 1;
    }
"""
"""Each thread loads 64 bytes before it stores them, because a load over the bus takes long."""


@cache
def _kernel() -> Callable[..., list[mx.array]]:
    kernel = mx.fast.cuda_kernel("fill_slots", ["slab", "jobs", "first"], ["written"], _SOURCE)
    return cast(Callable[..., list[mx.array]], kernel)


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
    (written,) = _kernel()(
        inputs=[slab, jobs, length_as_shape(first + 1)],
        output_shapes=[(1,)],
        output_dtypes=[mx.uint8],
        grid=(_BLOCK * _BLOCKS_A_RECORD, count, 1),
        threadgroup=(_BLOCK, 1, 1),
    )
    mx.async_eval(written)  # type: ignore[no-untyped-call]
    return written


def finish_filling_slots(begun: Sequence[mx.array] | None) -> None:
    """Wait until all records of ``begun``, results of ``begin_filling_slots``, have been copied; None: all records."""
    if begun is None:
        mx.synchronize()
    else:
        mx.eval(begun)
