"""Common parts of the machines that run GPU kernels on a CPU: the call that MLX defines, buffers, and clang."""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

_MARGIN = 4096
_ALIGNMENT = 256


_OPTIONS = [
    "-std=c++17",
    "-fno-exceptions",
    "-fno-rtti",
    "-nostdinc++",
    "-fPIC",
    "-Wno-everything",
]


class KernelFault(AssertionError):  # noqa: N818  # the kernel's, not the caller's
    """An operation of a kernel that its language does not define, or a compiler error."""


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: evaluated, contiguous arrays and a grid of threads."""

    inputs: list[mx.array]
    outputs: list[mx.array]
    """Zeros, to be filled."""
    grid: tuple[int, int, int]
    """Threads, in whole threadgroups."""
    threadgroup: tuple[int, int, int]
    template: list[tuple[str, Any]]


def launched(run: Callable[[Launch], None]) -> Callable[..., list[mx.array]]:
    """Return a function with the signature of MLX's kernels; ``run`` fills its outputs at the call."""

    def call(
        *,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] = (),
    ) -> list[mx.array]:
        assert all(size % group == 0 for size, group in zip(grid, threadgroup, strict=True)), "whole threadgroups"
        inputs = [mx.contiguous(array) for array in inputs]
        outputs = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        mx.eval(inputs, outputs)
        run(Launch(inputs, outputs, grid, threadgroup, list(template)))
        return outputs

    return call


class Buffer:
    """An array's bytes for a kernel, aligned to 256. Around them, and in outputs, every byte is 0xff, which is NaN."""

    def __init__(self, array: mx.array, *, output: bool) -> None:
        room = np.full(array.nbytes + 2 * _MARGIN + _ALIGNMENT, 0xFF, np.uint8)
        start = _MARGIN + -(room.ctypes.data + _MARGIN) % _ALIGNMENT
        self._array = np.asarray(memoryview(array).cast("B"))
        self._bytes = room[start : start + array.nbytes]
        self.address: int = self._bytes.ctypes.data
        self.nbytes = array.nbytes
        if not output:
            self._bytes[:] = self._array
        self._given = None if output else self._bytes.copy()

    def give_back(self) -> None:
        """Copy an output, or the bytes of an input that the kernel changed, into the array.

        Unchanged bytes of an input stay, because a store may have filled other slots of it meanwhile.
        """
        if self._given is None:
            self._array[:] = self._bytes
        else:
            changed = self._bytes != self._given
            self._array[changed] = self._bytes[changed]


class Clang:
    """Clang with ``options``, for texts that may include the headers of ``folder``."""

    def __init__(self, folder: Path, options: Sequence[str] = ()) -> None:
        self._headers = [path.read_text() for path in sorted(folder.glob("*.h"))]
        self._options = [*_OPTIONS, f"-I{folder}", *options]

    def hosted(self, text: str, *options: str) -> Path:
        """Compile ``text``, which may include headers of the C library, and return the object file."""
        command = [_zig(), "cc", "-fno-sanitize=all", *self._options, *options, "-c"]
        return self._made(".o", [*command, text], lambda source, new: _run([*command, str(source), "-o", str(new)]))

    def freestanding(self, text: str, strict: Sequence[str], *options: str) -> Path:
        """Compile ``text``, which includes no header of the C library, and return the object file.

        The text must also be valid with the options ``strict``. This takes half the time of ``hosted``, since clang
        runs without the frame of ``zig cc``.
        """
        command = [_zig(), "clang", "-target", f"{platform.machine()}-linux-gnu", *self._options]

        def compile_twice(source: Path, new: Path) -> None:
            _run([*command, *strict, "-fsyntax-only", str(source)])
            _run([*command, *options, "-c", str(source), "-o", str(new)])

        return self._made(".o", [*command, *strict, *options, text], compile_twice)

    def load(self, *objects: Path) -> ctypes.CDLL:
        """Link ``objects`` and load the library; it finds the C library in this process."""

        def link(_: Path, new: Path) -> None:
            _run([_zig(), "ld.lld", "-shared", *map(str, objects), "-o", str(new)])

        return _loaded(self._made(".so", [path.name for path in objects], link))

    def _made(self, suffix: str, parts: Sequence[str], make: Callable[[Path, Path], None]) -> Path:
        """Return the file that ``make`` makes of a source with the last of ``parts``, on which the file depends.

        A cache shared by a user's processes keeps it.
        """
        folder = Path(tempfile.gettempdir(), f"kernels_on_cpu-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        counts = "\0".join([*parts, *self._headers])
        file = folder / f"{hashlib.sha256(counts.encode()).hexdigest()[:32]}{suffix}"
        if not file.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                source, new = Path(scratch, "kernel.cpp"), Path(scratch, f"kernel{suffix}")
                source.write_text(parts[-1])
                make(source, new)
                new.replace(file)
        return file


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelFault(f"clang refuses the kernel: {done.stderr}")


@cache
def _loaded(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


@cache
def _zig() -> str:
    """Return the compiler of the wheel; ``python -m ziglang`` would start another Python first."""
    found = find_spec("ziglang")
    assert found is not None, "pip install ziglang"
    assert found.origin is not None
    return str(Path(found.origin).with_name("zig"))
