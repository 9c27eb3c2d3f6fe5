"""Run CUDA kernels that use the copy engine on a CPU: their exact text, compiled by clang, on a machine of coroutines.

``Machine.cuda_kernel`` stands in for ``mx.fast.cuda_kernel``. What it catches, as a ``CudaFault``: threads that wait
for each other for ever, also when few threadgroups run at once; barriers at which too many arrive; misaligned copies.
What is read before its copy has landed, or was never written, is NaN or far off. What it cannot know: the order in
which a GPU makes writes visible, and its speed.
"""

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from nvrtc import C_TYPES

from flashmoe_mlx import custom_kernels

_HERE = Path(__file__).parent
_FLAGS = ["-std=c++17", "-O1", "-fno-exceptions", "-fno-rtti", "-fno-sanitize=all", "-nostdinc++", "-fPIC", "-shared"]
_FLAGS += ["-Wno-everything", f"-I{_HERE}"]
_REPLACED = ("cuda.h", "copy_engine.h")
"""The dialect's words that ``machine.h`` has its own of."""


class CudaFault(AssertionError):  # noqa: N818  # the kernel's, not the caller's
    """What a kernel did that CUDA does not define, or would not compile."""


class Machine:
    """Makes kernels that run here, ``at_once`` threadgroups at a time, in an order that depends on ``seed``."""

    def __init__(self, at_once: int, seed: int) -> None:
        self._at_once = at_once
        self._seed = seed

    def cuda_kernel(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        shared_memory: int = 0,
    ) -> Callable[..., list[mx.array]]:
        """As ``mx.fast.cuda_kernel``; the kernel runs when it is called. Inputs that it writes to change."""

        def call(
            *,
            inputs: Sequence[mx.array],
            output_shapes: Sequence[tuple[int, ...]],
            output_dtypes: Sequence[mx.Dtype],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            template: Sequence[tuple[str, Any]] = (),
        ) -> list[mx.array]:
            inputs = [mx.contiguous(array) for array in inputs]
            outputs = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
            mx.eval(inputs, outputs)
            arrays = [*inputs, *outputs]
            text = _unit([*input_names, *output_names], [array.dtype for array in arrays], source, header, template)
            places = [_aligned(array) for array in arrays]
            for place in places[len(inputs) :]:
                place[:] = 0xFF
            library = _compiled(text)
            library.run.restype = ctypes.c_char_p
            fault = library.run(
                (ctypes.c_void_p * len(places))(*(place.ctypes.data for place in places)),
                grid[0] // threadgroup[0],
                threadgroup[0],
                self._at_once,
                ctypes.c_size_t(shared_memory),
                ctypes.c_uint64(self._seed),
            )
            if fault:
                raise CudaFault(f"{name}: {fault.decode()}")
            for array, place in zip(arrays, places, strict=True):
                np.asarray(memoryview(array).cast("B"))[:] = place
            return outputs

        return call


def _aligned(array: mx.array) -> np.ndarray[Any, Any]:
    """The bytes of ``array`` at a multiple of 256."""
    room = np.empty(array.nbytes + 256, np.uint8)
    start = -room.ctypes.data % 256
    place = room[start : start + array.nbytes]
    place[:] = np.asarray(memoryview(array).cast("B"))
    return place


def _unit(
    names: Sequence[str], dtypes: Sequence[mx.Dtype], source: str, header: str, template: Sequence[tuple[str, Any]]
) -> str:
    """A C++ file with the kernel's body as a function of the machine."""
    dialects = Path(str(custom_kernels.__path__[0]), "dialects")
    for file in _REPLACED:
        header = header.replace((dialects / file).read_text(), "")
    constants = [
        f"using {name} = {C_TYPES[value]};" if isinstance(value, mx.Dtype) else f"constexpr int {name} = {value};"
        for name, value in template
    ]
    arguments = [
        f"{C_TYPES[dtype]}* {name} = ({C_TYPES[dtype]}*)buffers[{i}];"
        for i, (name, dtype) in enumerate(zip(names, dtypes, strict=True))
    ]
    return "\n".join(['#include "machine.h"', header, "static void body() {", *constants, *arguments, source, "}"])


@cache
def _compiled(text: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(text)
        command = [sys.executable, "-m", "ziglang", "cc", "-x", "c++", *_FLAGS, str(source), "-o", str(library), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CudaFault(f"clang refuses the kernel: {done.stderr}")
        return ctypes.CDLL(str(library))
