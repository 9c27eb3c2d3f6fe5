"""Run CUDA kernels on a CPU: their text, compiled by clang, on a machine of coroutines (``machine.h``).

``Machine`` replaces ``mx.fast.precompiled_cuda_kernel`` and ``mx.fast.cuda_kernel``. It raises ``KernelFault`` for
threads that wait for each other forever, also when few threadgroups run at once, for barriers with too many arrivals,
and for misaligned copies. Data that is read before its copy has arrived, and unwritten data, is NaN or far off. The
order in which a GPU makes writes visible cannot be checked here.
"""

import ctypes
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from kernels_on_cpu import Buffer, Clang, KernelFault, Launch, launched

from flashmoe_mlx.custom_kernels.cuda_text import cuda_text, shape_reads

_CLANG = Clang(Path(__file__).parent, ["-O1", "-U_FORTIFY_SOURCE"])
_FUNCTION = re.compile(r"^(?:template <[^\n]*>\n)?inline .*?^\}\n", re.MULTILINE | re.DOTALL)
_INCLUDE = re.compile(r"^#include <.*>\n", re.MULTILINE)
_DECLARATION = 'extern "C" __global__ void '
_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?uint4 (\w+)\[\]")


class Machine:
    """A machine that runs kernels, ``at_once`` threadgroups at a time, in an order that depends on ``seed``."""

    def __init__(self, at_once: int, seed: int) -> None:
        self._at_once = at_once
        self._seed = seed

    def precompiled_cuda_kernel(
        self,
        *,
        name: str,
        compiled_source: bytes,
        scalars: Sequence[int],
        shared_memory: int = 0,
        ensure_row_contiguous: bool = False,
        **call: Any,
    ) -> list[mx.array]:
        """Run a kernel as ``mx.fast.precompiled_cuda_kernel`` does, at once; its "machine code" is its CUDA text.

        Inputs that it writes to change.
        """
        assert ensure_row_contiguous or not call["inputs"]

        def run(launch: Launch) -> None:
            self._run(name, compiled_source.decode(), launch, scalars, shared_memory)

        return launched(run)(**call)

    def cuda_kernel(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        shared_memory: int = 0,
    ) -> Callable[..., list[mx.array]]:
        """Return a kernel as ``mx.fast.cuda_kernel`` does; it runs at its call. Inputs that it writes to change."""

        def run(launch: Launch) -> None:
            inputs = [(name, array.dtype) for name, array in zip(input_names, launch.inputs, strict=True)]
            outputs = [(name, array.dtype) for name, array in zip(output_names, launch.outputs, strict=True)]
            text = cuda_text(name, inputs, outputs, header, source, launch.template)
            reads = shape_reads(source, tuple(input_names))
            scalars = [launch.inputs[position].shape[axis] for position, axis in reads]
            self._run(name, text, launch, scalars, shared_memory)

        return launched(run)

    def _run(self, name: str, text: str, launch: Launch, scalars: Sequence[int], shared_memory: int) -> None:
        library = _CLANG.load(_CLANG.hosted(_unit(name, text)))
        arrays = [*launch.inputs, *launch.outputs]
        buffers = [Buffer(array, output=i >= len(launch.inputs)) for i, array in enumerate(arrays)]
        sizes = np.array(scalars, np.int32)
        addresses = [*(buffer.address for buffer in buffers), sizes.ctypes.data]
        groups = [size // group for size, group in zip(launch.grid, launch.threadgroup, strict=True)]
        library.run.restype = ctypes.c_char_p
        fault = library.run(
            (ctypes.c_void_p * len(addresses))(*addresses),
            (ctypes.c_uint * 3)(*groups),
            launch.threadgroup[0],
            self._at_once,
            ctypes.c_size_t(shared_memory),
            ctypes.c_uint64(self._seed),
        )
        if fault:
            raise KernelFault(f"{name}: {fault.decode()}")
        for buffer in buffers:
            buffer.give_back()


def _unit(name: str, text: str) -> str:
    """Return a C++ file with the kernel in ``text`` as a function of the machine."""
    start = text.index(_DECLARATION + name) + len(_DECLARATION + name)
    types = [argument.rpartition(" ")[0].strip() for argument in text[start + 1 : text.index(")", start)].split(",")]
    pointers = [f"({of})buffers[{i}]" for i, of in enumerate(types) if of.endswith("*")]
    scalars = [f"((const int*)buffers[{len(pointers)}])[{i}]" for i in range(len(types) - len(pointers))]
    for_cpu = _INCLUDE.sub("", text).replace(_DECLARATION, "static void ")
    for_cpu = _FUNCTION.sub(lambda function: "" if _in_ptx(function.group()) else function.group(), for_cpu)
    call = f"static void body() {{ {name}({', '.join([*pointers, *scalars])}); }}"
    shared = _SHARED.sub(r"uint4* \1 = (uint4*)now->group->shared", for_cpu)
    return "\n".join(['#include "machine.h"', shared, call])


def _in_ptx(function: str) -> bool:
    """Return whether ``machine.h`` replaces this function, which has assembly for a GPU."""
    return "asm" in function or "__cvta" in function
