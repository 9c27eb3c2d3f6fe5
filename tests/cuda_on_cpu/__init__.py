"""Run CUDA kernels on a CPU: their text, compiled by clang, on a machine of coroutines (``machine.h``).

``Machine.cuda_kernel`` replaces ``mx.fast.cuda_kernel``. It raises ``KernelFault`` for threads that wait for each other
forever, also when few threadgroups run at once, for barriers with too many arrivals, and for misaligned copies. Data
that is read before its copy has arrived, and unwritten data, is NaN or far off. The order in which a GPU makes writes
visible cannot be checked here.
"""

import ctypes
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from kernels_on_cpu import Buffer, Clang, KernelFault, Launch, launched
from nvrtc import C_TYPES

_CLANG = Clang(Path(__file__).parent, ["-O1", "-U_FORTIFY_SOURCE"])
_FUNCTION = re.compile(r"^(?:template <[^\n]*>\n)?inline .*?^\}\n", re.MULTILINE | re.DOTALL)
_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?uint4 (\w+)\[\]")


class Machine:
    """A machine that runs kernels, ``at_once`` threadgroups at a time, in an order that depends on ``seed``."""

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
        """Return a kernel as ``mx.fast.cuda_kernel`` does; it runs at its call. Inputs that it writes to change."""

        def run(launch: Launch) -> None:
            arrays = [*launch.inputs, *launch.outputs]
            names = [*input_names, *output_names]
            unit = _unit(names, [array.dtype for array in arrays], source, header, launch.template)
            library = _CLANG.load(_CLANG.hosted(unit))
            buffers = [Buffer(array, output=i >= len(launch.inputs)) for i, array in enumerate(arrays)]
            shapes = [np.array(array.shape, np.int32) for array in arrays]
            addresses = [*(buffer.address for buffer in buffers), *(shape.ctypes.data for shape in shapes)]
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

        return launched(run)


def _unit(
    names: Sequence[str], dtypes: Sequence[mx.Dtype], source: str, header: str, template: Sequence[tuple[str, Any]]
) -> str:
    """Return a C++ file with the kernel's body as a function of the machine."""
    constants = [
        f"using {name} = {C_TYPES[value]};" if isinstance(value, mx.Dtype) else f"constexpr int {name} = {value};"
        for name, value in template
    ]
    arguments = [
        f"{C_TYPES[dtype]}* {name} = ({C_TYPES[dtype]}*)buffers[{i}];"
        for i, (name, dtype) in enumerate(zip(names, dtypes, strict=True))
    ]
    shapes = [
        f"const int* {name}_shape = (const int*)buffers[{len(names) + i}];"
        for i, name in enumerate(names)
        if f"{name}_shape" in source
    ]
    words = _FUNCTION.sub(lambda function: "" if _in_ptx(function.group()) else function.group(), header)
    text = "\n".join([words, "static void body() {", *constants, *arguments, *shapes, source, "}"])
    return '#include "machine.h"\n' + _SHARED.sub(r"uint4* \1 = (uint4*)now->group->shared", text)


def _in_ptx(function: str) -> bool:
    """Return whether ``machine.h`` replaces this function, which has assembly for a GPU."""
    return "asm" in function or "__cvta" in function
