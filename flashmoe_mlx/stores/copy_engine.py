"""Copies from pinned memory of the CPU to an NVIDIA GPU by the GPU's copy engine, beside the kernels of MLX.

What the CPU writes to an array of MLX is in managed memory on CUDA. Its pages move to the GPU when a kernel reads them,
and back when the CPU writes again, with faults both ways: 3 GB/s. Pinned memory stays where it is, and the copy engine
reads it at the speed of the bus (docs/measurements/2026-11-26-gpu-reading.md).

The copies have a stream of their own, which MLX does not know. Whoever begins a copy must therefore wait for it before
any kernel that reads its target is launched, and no kernel that reads the target may be running.
"""

import ctypes
import logging
import threading
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Protocol

from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.stores.allocation import allocate_huge_pages
from flashmoe_mlx.stores.libc import address_of

_log = logging.getLogger(__name__)

_PORTABLE = 1
"""CU_MEMHOSTREGISTER_PORTABLE of cuda.h: all threads and contexts may copy from the memory."""
_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING of cuda.h: neither waits for the default stream nor makes it wait."""


class CopyEngineError(FlashMoeError):
    """A refusal of NVIDIA's driver."""

    default_code = "gpu_copy_failed"


class CopyEngine(Protocol):
    """The part of NVIDIA's driver that copies to a GPU. All methods may be called from any thread."""

    def pin(self, address: int, nbytes: int) -> None:
        """Keep the pages of ``nbytes`` at ``address`` in physical memory; raise CopyEngineError if refused."""
        ...

    def unpin(self, address: int) -> None:
        """Wait for all copies, and end ``pin``."""
        ...

    def begin_copy(self, target: int, source: memoryview) -> None:
        """Begin to copy pinned memory to the address ``target`` on the GPU; ``source`` must not change before ``wait``.

        Raises:
            CopyEngineError: the driver reports an error.
        """
        ...

    def wait(self) -> None:
        """Wait for all copies; raise CopyEngineError if one failed."""
        ...


class _Driver:
    """NVIDIA's driver, called through ``ctypes``, which releases the interpreter's lock during each call."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CopyEngineError(f"NVIDIA's driver does not load: {error}") from error
        self._threads = threading.local()
        self._context, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        device = ctypes.c_int()
        self._check("cuInit", 0)
        self._check("cuDeviceGet", ctypes.byref(device), 0)
        # The context that MLX uses as well. It is never released: MLX needs it until the process ends.
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._call("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(_NON_BLOCKING))

    def pin(self, address: int, nbytes: int) -> None:
        self._call("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(_PORTABLE))

    def unpin(self, address: int) -> None:
        self.wait()
        self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    def begin_copy(self, target: int, source: memoryview) -> None:
        self._call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(target),
            ctypes.c_void_p(address_of(source)),
            ctypes.c_size_t(source.nbytes),
            self._stream,
        )

    def wait(self) -> None:
        self._call("cuStreamSynchronize", self._stream)

    def _call(self, name: str, *arguments: object) -> None:
        """Call a function of the driver in the context that MLX uses."""
        if not hasattr(self._threads, "ready"):
            self._check("cuCtxSetCurrent", self._context)
            self._threads.ready = True
        self._check(name, *arguments)

    def _check(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise CopyEngineError(f"NVIDIA's driver reports error {status} in {name}")


@cache
def copy_engine() -> CopyEngine | None:
    """Return the copy engine of the first GPU, which MLX uses; None, with a warning, if the driver refuses to pin."""
    try:
        driver = _Driver()
        probe = allocate_huge_pages(1)
        driver.pin(address_of(probe), probe.nbytes)
        driver.unpin(address_of(probe))
    except (CopyEngineError, OSError) as error:
        _log.warning("%s; experts reach the GPU through managed memory, which is several times slower", error)
        return None
    return driver


class PinnedRows:
    """Memory for ``count`` records that the copy engine reads, in large pages; freed with its last view.

    Raises:
        CopyEngineError: the driver refuses to pin as much.
        OSError: the system does not grant that much memory.
    """

    def __init__(self, count: int, record_bytes: int, engine: CopyEngine) -> None:
        size = count * record_bytes
        memory = allocate_huge_pages(size)
        address = address_of(memory)
        engine.pin(address, size)
        # All views refer to this object, which ends before the memory is unmapped.
        owner = (ctypes.c_uint8 * size).from_buffer(memory)
        weakref.finalize(owner, engine.unpin, address).atexit = False  # the driver may have ended by then
        view = memoryview(owner).cast("B")
        self.count = count
        self._rows = [view[row * record_bytes : (row + 1) * record_bytes] for row in range(count)]

    def rows(self, places: Sequence[int]) -> list[memoryview]:
        """Return the writable bytes of the rows with the indices ``places``."""
        return [self._rows[place] for place in places]
