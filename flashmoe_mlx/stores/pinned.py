"""Memory of the CPU that an NVIDIA GPU reads at the speed of the bus.

What the CPU writes to an array of MLX is in managed memory on CUDA. Its pages move to the GPU when a kernel reads them,
and back when the CPU writes again, with faults both ways: 3 GB/s. Pinned memory stays where it is, and kernels read it
over the bus: 37 to 43 GB/s (docs/measurements/2026-11-26-gpu-reading.md).
"""

import ctypes
import logging
import weakref
from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from flashmoe_mlx.formats.record import RECORD_ALIGNMENT
from flashmoe_mlx.stores.allocation import allocate_huge_pages
from flashmoe_mlx.stores.libc import address_of
from flashmoe_mlx.stores.slab import check_allocation

_log = logging.getLogger(__name__)

_PORTABLE, _DEVICE_MAP = 1, 2
"""CU_MEMHOSTREGISTER_PORTABLE and _DEVICEMAP of cuda.h: for all contexts, and for kernels."""


class DriverError(Exception):
    """A refusal of NVIDIA's driver."""


class Driver:
    """The part of NVIDIA's driver that pins memory; all methods may be called from any thread.

    Raises:
        DriverError: the driver does not load, or it reports an error.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DriverError(f"NVIDIA's driver does not load: {error}") from error
        self._context = ctypes.c_void_p()
        device = ctypes.c_int()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        # The context that MLX uses as well. It is never released: MLX needs it until the process ends.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def pin(self, address: int, nbytes: int) -> None:
        """Keep the pages of ``nbytes`` at ``address`` in physical memory, and let kernels read them at that address.

        Raises:
            DriverError: the driver refuses, or kernels would need another address.
        """
        self._call("cuCtxSetCurrent", self._context)
        flags = ctypes.c_uint(_PORTABLE | _DEVICE_MAP)
        self._call("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), flags)
        seen = ctypes.c_uint64()
        try:
            self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(seen), ctypes.c_void_p(address), ctypes.c_uint(0))
            if seen.value != address:
                raise DriverError("NVIDIA's driver gives pinned memory another address on the GPU")
        except DriverError:
            self.unpin(address)
            raise

    def unpin(self, address: int) -> None:
        """Wait for all kernels, and end ``pin``."""
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuCtxSynchronize")
        self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise DriverError(f"NVIDIA's driver reports error {status} in {name}")


@cache
def driver() -> Driver:
    """Return the driver of this process; raise DriverError if there is none."""
    return Driver()


class PinnedRows:
    """Memory for ``count`` records that the CPU writes and kernels read at the same address.

    It is pinned and in large pages, or, with a warning, managed if the driver refuses. It is freed with its last view.

    Raises:
        InputError: there is not enough memory (code "not_enough_memory").
    """

    def __init__(self, count: int, record_bytes: int) -> None:
        size = count * record_bytes
        check_allocation(count, size + RECORD_ALIGNMENT)
        try:
            memory = _pinned(size)
        except (DriverError, OSError) as error:
            _log.warning("%s; experts reach the GPU through managed memory, which is several times slower", error)
            memory = _managed(size)
        self.count = count
        self._rows = [memory[row * record_bytes : (row + 1) * record_bytes] for row in range(count)]

    def rows(self, places: Sequence[int]) -> list[memoryview]:
        """Return the writable bytes of the rows with the indices ``places``."""
        return [self._rows[place] for place in places]


def _pinned(nbytes: int) -> memoryview:
    """Allocate pinned memory at a multiple of 2 MiB.

    Raises:
        DriverError: the driver refuses.
        OSError: the system does not grant that much memory.
    """
    calls = driver()
    memory = allocate_huge_pages(nbytes)
    address = address_of(memory)
    calls.pin(address, nbytes)
    # Every view refers to this object, which ends before the memory is unmapped.
    owner = (ctypes.c_uint8 * nbytes).from_buffer(memory)
    weakref.finalize(owner, calls.unpin, address).atexit = False  # the driver may have ended by then
    return memoryview(owner).cast("B")


def _managed(nbytes: int) -> memoryview:
    """Allocate memory of MLX at a multiple of 16 KiB; kernels on CUDA may read it at the CPU's address."""
    array = mx.zeros((nbytes + RECORD_ALIGNMENT,), mx.uint8)
    mx.eval(array)
    memory = memoryview(array).cast("B")  # type: ignore[arg-type]  # arrays have the buffer protocol
    start = -address_of(memory) % RECORD_ALIGNMENT
    return memory[start : start + nbytes]
