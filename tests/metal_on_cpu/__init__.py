"""Run Metal kernels on a CPU: the text that MLX generates, compiled by clang and executed under a strict checker.

``metal_kernel`` replaces ``mx.fast.metal_kernel``. It raises ``KernelFault`` for mixed address spaces, accesses out of
bounds or misaligned, writes to inputs, races, reads of unwritten memory, barriers and simdgroup operations that some
threads do not reach, and unwritten outputs. It cannot check the order of sums inside ``simd_sum`` on a real GPU, the
accuracy of Metal's functions, and whether Apple's compiler accepts the text.

``metal.h`` is the part of Metal's library that the kernels use; ``machine.cpp`` runs the kernels.
"""

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from kernels_on_cpu import Buffer, Clang, KernelFault, Launch, launched

_HERE = Path(__file__).parent
_MOST_THREADS = 1024
_CLANG = Clang(_HERE, ["-ffp-contract=off", "-U_FORTIFY_SOURCE", "-fno-vectorize", "-fno-slp-vectorize"])

_mlx_kernel = mx.fast.metal_kernel  # tests replace it by the function below
_in_place: set[str] = set()


@contextmanager
def writable(*names: str) -> Iterator[None]:
    """Let kernels write to the inputs ``names``, whose arrays change."""
    _in_place.update(names)
    try:
        yield
    finally:
        _in_place.difference_update(names)


def metal_kernel(
    name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str = ""
) -> Callable[..., list[mx.array]]:
    """Return a kernel as ``mx.fast.metal_kernel`` does; it runs on the CPU at its call."""
    real = _mlx_kernel(name, list(input_names), list(output_names), source, header)
    libraries: dict[object, ctypes.CDLL] = {}

    def run(launch: Launch) -> None:
        def trace(*arrays: mx.array) -> list[mx.array]:
            return real(
                inputs=list(arrays),
                output_shapes=[array.shape for array in launch.outputs],
                output_dtypes=[array.dtype for array in launch.outputs],
                grid=launch.grid,
                threadgroup=launch.threadgroup,
                template=launch.template,
                verbose=True,
            )

        # MLX's text depends on shapes, types and template arguments.
        arrays = tuple((array.shape, array.dtype) for array in [*launch.inputs, *launch.outputs])
        which = (arrays, tuple(launch.template))
        if which not in libraries:
            libraries[which] = _compiled(generated_text(trace, launch.inputs))
        names, inputs = _with_shapes(source, input_names, launch.inputs)
        _run(name, libraries[which], [*names, *output_names], [*inputs, *launch.outputs], len(inputs), launch)

    return launched(run)


def _with_shapes(source: str, names: Sequence[str], arrays: Sequence[mx.array]) -> tuple[list[str], list[mx.array]]:
    """Return the buffers that MLX passes for inputs: each array, and its shape if ``source`` reads that."""
    all_names, buffers = [], []
    for name, array in zip(names, arrays, strict=True):
        all_names.append(name)
        buffers.append(array)
        if f"{name}_shape" in source:
            all_names.append(f"{name}_shape")
            buffers.append(mx.array(array.shape, mx.int32))
    mx.eval(buffers)
    return all_names, buffers


def generated_text(function: Callable[..., Any], inputs: Sequence[mx.array]) -> str:
    """Return the Metal source that MLX prints when it traces the kernel in ``function``."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as printed:
        sys.stdout.flush()
        before = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(str(Path(folder, "traced.mlxfn")), function, *inputs)
        finally:
            os.dup2(before, 1)
            os.close(before)
        printed.seek(0)
        text = printed.read().decode()
    return text.split("```\n", 1)[1].rsplit("\n```", 1)[0]


def _unit(text: str) -> str:
    """Return a C++ file with the kernel and a function that calls it with buffers and a position."""
    instantiation = re.compile(r"^template \[\[host_name.*\]\] \[\[kernel\]\] decltype\((.*?)\) \1;$", re.MULTILINE)
    found = instantiation.search(text)
    text = instantiation.sub("", text)
    declaration = re.search(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", text, re.DOTALL)
    assert declaration is not None, "MLX's text has changed"
    function = declaration.group(1) if found is None else found.group(1)
    arguments = []
    for parameter in declaration.group(2).split(",\n"):
        declared = re.fullmatch(r"\s*(.+?)\s*([*&]?) (\w+) \[\[(?:buffer\((\d+)\)|\w+)\]\]", parameter)
        assert declared is not None, parameter
        kind, sign, name, index = declared.groups()
        if index is None:
            arguments.append(f"position->{name}")
        elif sign == "&":
            arguments.append(f"*({kind}*)buffers[{index}]")
        else:
            arguments.append(f"({kind}*)buffers[{index}]")
    return "\n".join(
        [
            '#include "metal.h"',
            "using namespace metal;",
            text,
            'extern "C" void metal_call(void** buffers, const Position* position) {',
            f"  {function}({', '.join(arguments)});",
            "}",
        ]
    )


def _compiled(text: str) -> ctypes.CDLL:
    unit = _unit(text)
    machine = _CLANG.hosted((_HERE / "machine.cpp").read_text(), "-O2", "-mcpu=baseline")
    kernel = _CLANG.freestanding(unit, ["-DSTRICT"], "-O1", "-Xclang", "-fsanitize=thread")
    return _CLANG.load(kernel, machine)


def _run(
    kernel: str,
    library: ctypes.CDLL,
    names: Sequence[str],
    arrays: Sequence[mx.array],
    inputs: int,
    launch: Launch,
) -> None:
    threads = int(np.prod(launch.threadgroup))
    if threads > _MOST_THREADS:
        raise KernelFault(f"{kernel}: {threads} threads a threadgroup; Metal has {_MOST_THREADS}")
    count = len(arrays)
    buffers = [Buffer(array, output=i >= inputs) for i, array in enumerate(arrays)]
    may_write = [i >= inputs or names[i] in _in_place for i in range(count)]
    unwritten, first = (ctypes.c_size_t * count)(), (ctypes.c_size_t * count)()
    library.metal_run.restype = ctypes.c_char_p
    fault = library.metal_run(
        library.metal_call,
        count,
        (ctypes.c_char_p * count)(*(name.encode() for name in names)),
        (ctypes.c_void_p * count)(*(buffer.address for buffer in buffers)),
        (ctypes.c_size_t * count)(*(buffer.nbytes for buffer in buffers)),
        (ctypes.c_uint8 * count)(*may_write),
        (ctypes.c_uint8 * count)(*(i < inputs for i in range(count))),
        (ctypes.c_uint32 * 3)(*launch.grid),
        (ctypes.c_uint32 * 3)(*launch.threadgroup),
        unwritten,
        first,
    )
    if fault:
        raise KernelFault(f"{kernel}: {fault.decode()}")
    for i, array in enumerate(arrays):
        if may_write[i]:
            buffers[i].give_back()
        if unwritten[i]:
            size = array.dtype.size
            raise KernelFault(
                f"{kernel}: {unwritten[i] // size} elements of {names[i]} are not written, "
                f"first number {first[i] // size}"
            )
