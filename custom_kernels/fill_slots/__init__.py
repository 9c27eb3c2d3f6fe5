"""Overwrite slots in a GPU's memory, in place.

MLX cannot write into an existing array: an update makes a new array unless nothing else refers to the old one, so a
store would copy gigabytes for every expert. On CUDA a kernel can write to its inputs.

This folder has no ``OPERATION``: stores call the kernel, not models, and MLX has no implementation to replace it if a
check at load failed. Tests compare it with its reference.
"""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.fill_slots import reference
from flashmoe_mlx.custom_kernels.kernel import Kernel

__all__ = ["fill_slots", "reference"]

KERNEL = Kernel(__package__, "body", ["slab", "records", "slots"], ["written"], in_place=["slab"])
_BLOCK = 256
_BLOCKS_A_RECORD = 64


def fill_slots(slab: mx.array, records: mx.array, slots: mx.array) -> None:
    """Overwrite rows of ``slab`` with the first N ``records``, in place; only on CUDA.

    Args:
        slab: uint8 [count, record_bytes], where record_bytes is a multiple of 16.
        records: uint8 [N or more, record_bytes].
        slots: rows of ``slab``, int32 [N], which no computation may be reading.
    """
    mx.eval(KERNEL([slab, records, slots], [((1,), mx.uint8)], (_BLOCKS_A_RECORD, slots.size, 1), _BLOCK, {}))
