"""Overwrite slots in a GPU's memory, in place.

MLX cannot write into an existing array: an update makes a new array unless nothing else refers to the old one, so a
store would copy gigabytes for every expert. On CUDA a kernel can write to its inputs.

This folder has no ``OPERATION``: stores call the kernel, not models, and MLX has no implementation to replace it if a
check at load failed. Tests compare it with its reference.
"""

from collections.abc import Callable
from functools import cache
from typing import cast

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.fill_slots import reference

__all__ = ["address_on_gpu", "fill_slots", "reference"]

_WIDTH = 16
"""Bytes per copy of a thread."""
_BLOCK = 256
_BLOCKS_A_RECORD = 64

_SOURCE = """
    const long row_words = slab_shape[1] / 16;
    const int record = blockIdx.y;
    const uint4* from = reinterpret_cast<const uint4*>(records) + record * row_words;
    uint4* to = reinterpret_cast<uint4*>(const_cast<uint8_t*>(slab)) + slots[record] * row_words;
    for (long word = blockIdx.x * blockDim.x + threadIdx.x; word < row_words; word += (long)gridDim.x * blockDim.x) {
        to[word] = from[word];
    }
    if (blockIdx.x == 0 && record == 0 && threadIdx.x == 0) {
        written[0] = 1;
    }
"""


_ADDRESS = """
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        address[0] = reinterpret_cast<int64_t>(array);
    }
"""


@cache
def _kernel() -> Callable[..., list[mx.array]]:
    kernel = mx.fast.cuda_kernel("fill_slots", ["slab", "records", "slots"], ["written"], _SOURCE)
    return cast(Callable[..., list[mx.array]], kernel)


@cache
def _address_kernel() -> Callable[..., list[mx.array]]:
    kernel = mx.fast.cuda_kernel("address_on_gpu", ["array"], ["address"], _ADDRESS)
    return cast(Callable[..., list[mx.array]], kernel)


def fill_slots(slab: mx.array, records: mx.array, slots: mx.array) -> None:
    """Overwrite rows of ``slab`` with the first N ``records``, in place; only on CUDA.

    Args:
        slab: uint8 [count, record_bytes], where record_bytes is a multiple of 16.
        records: uint8 [N or more, record_bytes].
        slots: rows of ``slab``, int32 [N], which no computation may be reading.
    """
    outputs = _kernel()(
        inputs=[slab, records, slots],
        output_shapes=[(1,)],
        output_dtypes=[mx.uint8],
        grid=(_BLOCK * _BLOCKS_A_RECORD, slots.size, 1),
        threadgroup=(_BLOCK, 1, 1),
    )
    mx.eval(outputs)


def address_on_gpu(array: mx.array) -> int:
    """Return the address of the evaluated ``array``, which is in the memory of a GPU; only on CUDA.

    It is valid as long as ``array`` exists and the CPU does not access it: at the first access MLX would move the array
    to other memory.
    """
    (address,) = _address_kernel()(
        inputs=[array],
        output_shapes=[(1,)],
        output_dtypes=[mx.int64],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    return int(np.array(address)[0])
