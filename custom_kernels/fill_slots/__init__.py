"""Overwrite slots in a GPU's memory, in place.

MLX has no operation that writes into an existing array: its updates make a new one unless nothing else refers to the
old, and then a store would copy gigabytes for every expert. On CUDA a kernel can write to what it was given to read.
"""

from collections.abc import Callable
from functools import cache
from typing import cast

import mlx.core as mx

from flashmoe_mlx.custom_kernels.fill_slots import reference

__all__ = ["fill_slots", "reference"]

_WIDTH = 16
"""Bytes that a thread copies at a time."""
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


@cache
def _kernel() -> Callable[..., list[mx.array]]:
    kernel = mx.fast.cuda_kernel("fill_slots", ["slab", "records", "slots"], ["written"], _SOURCE)
    return cast(Callable[..., list[mx.array]], kernel)


def fill_slots(slab: mx.array, records: mx.array, slots: mx.array) -> None:
    """Overwrite the rows ``slots``, int32 [N], of ``slab``, uint8 [count, record bytes], with the first N ``records``.

    Both in place and on CUDA alone; record bytes must be a multiple of 16, and nothing may be reading those rows.
    """
    outputs = _kernel()(
        inputs=[slab, records, slots],
        output_shapes=[(1,)],
        output_dtypes=[mx.uint8],
        grid=(_BLOCK * _BLOCKS_A_RECORD, slots.size, 1),
        threadgroup=(_BLOCK, 1, 1),
    )
    mx.eval(outputs)
