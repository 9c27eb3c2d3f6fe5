"""NVIDIA GPUs: properties that MLX does not report, from NVIDIA's driver; and MLX's way to launch kernels."""

import ctypes
import os
from dataclasses import dataclass
from functools import cache

COPY_ENGINE = 9
"""The first major compute capability with asynchronous bulk copies to shared memory (cp.async.bulk)."""
_MULTIPROCESSORS, _CAPABILITY, _MINOR, _SHARED_MEMORY = 16, 75, 76, 97
"""CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, _COMPUTE_CAPABILITY_MAJOR, _MINOR, _MAX_SHARED_MEMORY_PER_BLOCK_OPTIN."""


@dataclass(frozen=True)
class Gpu:
    """Properties of a GPU.

    Attributes:
        multiprocessors: number of multiprocessors.
        capability: major compute capability.
        shared_memory: largest shared memory of a threadgroup, in bytes.
        minor: minor compute capability.
    """

    multiprocessors: int
    capability: int
    shared_memory: int
    minor: int = 0

    @property
    def architecture(self) -> str:
        """The compiler's name of the GPU, with the instructions that no other architecture has."""
        return f"sm_{self.capability}{self.minor}{'a' if self.capability >= COPY_ENGINE else ''}"


def launch_directly() -> None:
    """Let MLX launch kernels one by one instead of in CUDA graphs, unless the environment says otherwise.

    MLX reads the variable when it first uses the GPU. A graph is cheaper for the GPU, but building it takes the host
    longer than launching its kernels: on an H100, a decoded token took 2.0 ms instead of 2.5 ms, and a prompt of 4,096
    tokens 0.87 s instead of 0.91 s.
    """
    os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")


@cache
def gpu() -> Gpu:
    """Return the properties of the first GPU, which MLX uses.

    Raises:
        RuntimeError: the driver is missing or reports an error.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"NVIDIA's driver does not load: {error}") from error
    device = ctypes.c_int()
    _check(driver.cuInit(0))
    _check(driver.cuDeviceGet(ctypes.byref(device), 0))

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _check(driver.cuDeviceGetAttribute(ctypes.byref(value), number, device))
        return value.value

    return Gpu(*map(attribute, (_MULTIPROCESSORS, _CAPABILITY, _SHARED_MEMORY, _MINOR)))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVIDIA's driver reports error {status}")
