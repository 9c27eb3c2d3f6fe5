"""Run Metal kernels on a CPU: the text that MLX generates, compiled by clang and executed under a strict checker.

``metal_kernel`` stands in for ``mx.fast.metal_kernel``. What it catches, as a ``MetalFault``: address spaces that are
mixed, accesses out of bounds or misaligned, writes to inputs, races, reads of what nobody wrote, barriers and simdgroup
operations that not all threads reach, outputs that are not written. What it cannot know: how a real GPU orders sums
inside ``simd_sum``, how exact its functions are, and whether Apple's compiler takes the text.

``metal.h`` is the part of Metal's library that the kernels use, ``machine.h`` the machine that runs them.
"""

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

_HERE = Path(__file__).parent
_MARGIN = 4096
_MOST_THREADS = 1024
_FLAGS = ["-std=c++17", "-fno-exceptions", "-fno-rtti", "-fno-sanitize=all", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
_FLAGS += [
    "-mcpu=baseline",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-nostdinc++",
    "-fPIC",
    "-Wno-everything",
    f"-I{_HERE}",
]


class MetalFault(AssertionError):  # noqa: N818  # the kernel's, not the caller's
    """What a kernel did that Metal does not define, or would not compile."""


_mlx_kernel = mx.fast.metal_kernel  # tests put ours in its place
_in_place: set[str] = set()


@contextmanager
def writable(*names: str) -> Iterator[None]:
    """Let kernels write to the inputs called ``names``; the arrays change."""
    _in_place.update(names)
    try:
        yield
    finally:
        _in_place.difference_update(names)


def metal_kernel(
    name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str = ""
) -> Callable[..., list[mx.array]]:
    """As ``mx.fast.metal_kernel``; the kernel runs when it is called, on the CPU."""
    real = _mlx_kernel(name, list(input_names), list(output_names), source, header)

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
        mx.eval(inputs)

        def trace(*arrays: mx.array) -> list[mx.array]:
            return real(
                inputs=list(arrays),
                output_shapes=list(output_shapes),
                output_dtypes=list(output_dtypes),
                grid=grid,
                threadgroup=threadgroup,
                template=list(template),
                verbose=True,
            )

        text = generated_text(trace, inputs)
        outputs = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        mx.eval(outputs)
        names, arrays = _with_shapes(source, input_names, inputs)
        places = [*names, *output_names]
        _run(name, _compiled(text), places, [*arrays, *outputs], len(arrays), grid, threadgroup)
        return outputs

    return call


def _with_shapes(source: str, names: Sequence[str], arrays: Sequence[mx.array]) -> tuple[list[str], list[mx.array]]:
    """The buffers that MLX passes for inputs: after one whose shape ``source`` asks for comes that shape."""
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
    """What MLX prints of the kernel in ``function`` when it is traced: its exact Metal source."""
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
    """A C++ file with the kernel and one function that calls it with buffers and a position."""
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
            "#ifndef STRICT",
            '#include "machine.h"',
            "#endif",
            "using namespace metal;",
            text,
            'extern "C" void metal_call(void** buffers, const Position* position) {',
            f"  {function}({', '.join(arguments)});",
            "}",
        ]
    )


def _compiled(text: str) -> ctypes.CDLL:
    unit = _unit(text)
    parts = [unit, *(path.read_text() for path in sorted(_HERE.glob("*.h"))), " ".join([*_compiler(), *_FLAGS])]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir(), f"metal_on_cpu-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{name}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source = Path(scratch, "kernel.cpp")
            source.write_text(unit)
            _compile(["-DSTRICT", "-O0", "-c", str(source), "-o", str(Path(scratch, "strict.o"))])
            made = Path(scratch, "kernel.so")
            _compile(["-O1", "-Xclang", "-fsanitize=thread", "-shared", str(source), "-o", str(made), "-lm"])
            made.replace(library)
    return _loaded(str(library))


@cache
def _loaded(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


@cache
def _compiler() -> list[str]:
    return [sys.executable, "-m", "ziglang", "cc", "-x", "c++"]


def _compile(arguments: list[str]) -> None:
    done = subprocess.run([*_compiler(), *_FLAGS, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MetalFault(f"clang refuses the kernel: {done.stderr}")


def _run(
    kernel: str,
    library: ctypes.CDLL,
    names: Sequence[str],
    arrays: Sequence[mx.array],
    inputs: int,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
) -> None:
    threads = int(np.prod(threadgroup))
    if threads > _MOST_THREADS:
        raise MetalFault(f"{kernel}: {threads} threads a threadgroup; Metal has {_MOST_THREADS}")
    assert all(size % group == 0 for size, group in zip(grid, threadgroup, strict=True)), "grids in whole threadgroups"
    count = len(arrays)
    places, buffers = zip(*(_surrounded(array, poisoned=i >= inputs) for i, array in enumerate(arrays)), strict=True)
    may_write = [i >= inputs or names[i] in _in_place for i in range(count)]
    unwritten, first = (ctypes.c_size_t * count)(), (ctypes.c_size_t * count)()
    library.metal_run.restype = ctypes.c_char_p
    fault = library.metal_run(
        library.metal_call,
        count,
        (ctypes.c_char_p * count)(*(name.encode() for name in names)),
        (ctypes.c_void_p * count)(*(place.ctypes.data for place in places)),
        (ctypes.c_size_t * count)(*(place.nbytes for place in places)),
        (ctypes.c_uint8 * count)(*may_write),
        (ctypes.c_uint8 * count)(*(i < inputs for i in range(count))),
        (ctypes.c_uint32 * 3)(*grid),
        (ctypes.c_uint32 * 3)(*threadgroup),
        unwritten,
        first,
    )
    del buffers
    if fault:
        raise MetalFault(f"{kernel}: {fault.decode()}")
    for i, array in enumerate(arrays):
        if may_write[i]:
            np.asarray(memoryview(array).cast("B"))[:] = places[i]
        if unwritten[i]:
            size = array.dtype.size
            raise MetalFault(
                f"{kernel}: {unwritten[i] // size} elements of {names[i]} are not written, "
                f"first number {first[i] // size}"
            )


def _surrounded(array: mx.array, *, poisoned: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The bytes of ``array``, or as many of 0xff (NaN), with a margin on both sides that belongs to no buffer."""
    buffer = np.full(array.nbytes + 2 * _MARGIN + 64, 0xFF, np.uint8)
    start = _MARGIN + -(buffer.ctypes.data + _MARGIN) % 64
    place = buffer[start : start + array.nbytes]
    if not poisoned:
        place[:] = np.asarray(memoryview(array).cast("B"))
    return place, buffer
