"""NVIDIA's run-time compiler (NVRTC), called without MLX, so that results can be kept and threads compile together.

MLX compiles a custom kernel again in every process, one after the other, with headers that our kernels do not need.
"""

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_MAJORS = (13, 12)
"""Versions of NVRTC whose machine code MLX's wheels run."""
OPTIONS = ("--device-as-default-execution-space", "--std=c++17")


class CompilerError(RuntimeError):
    """Error of NVRTC, or the reason why it cannot be used; the message may have several lines."""


@dataclass(frozen=True)
class Compiler:
    """NVRTC and the headers of CUDA.

    Attributes:
        library: the loaded library.
        include: folder with ``cuda_bf16.h``.
        version: identifies the library and the headers: machine code of another version is another result.
    """

    library: ctypes.CDLL
    include: Path
    version: str

    def compile(self, text: str, name: str, architecture: str) -> bytes:
        """Compile ``text``; other threads can run meanwhile.

        Args:
            text: a complete file of CUDA C++.
            name: name of the file in messages.
            architecture: such as "sm_90a".

        Returns:
            Machine code, a cubin.

        Raises:
            CompilerError: the text has an error, or the architecture is unknown.
        """
        program = ctypes.c_void_p()
        self._check(
            self.library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None)
        )
        try:
            return self._compiled(program, [*OPTIONS, f"--gpu-architecture={architecture}", f"-I{self.include}"])
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _compiled(self, program: ctypes.c_void_p, options: list[str]) -> bytes:
        texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        size = ctypes.c_size_t()
        if self.library.nvrtcCompileProgram(program, len(options), texts):
            self._check(self.library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            self._check(self.library.nvrtcGetProgramLog(program, log))
            raise CompilerError(log.value.decode(errors="replace"))
        self._check(self.library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        self._check(self.library.nvrtcGetCUBIN(program, code))
        return code.raw

    def _check(self, status: int) -> None:
        if status:
            self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CompilerError(f"NVRTC: {self.library.nvrtcGetErrorString(status).decode()}")


@cache
def compiler() -> Compiler:
    """Return the compiler that MLX uses.

    Raises:
        CompilerError: the library or the headers are missing.
    """
    library = _library()
    include = next((folder for folder in _include_folders() if (folder / "cuda_bf16.h").is_file()), None)
    if include is None:
        raise CompilerError("no cuda_bf16.h; pip install nvidia-cuda-runtime, or set CUDA_HOME")
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    headers = sorted(path for name in ("cuda_bf16", "cuda_fp16") for path in include.glob(f"{name}.h*"))
    sizes = [str(path.stat().st_size) for path in headers]
    return Compiler(library, include, " ".join([f"{major.value}.{minor.value}", *sizes]))


def _library() -> ctypes.CDLL:
    names = [f"libnvrtc.so.{major}" for major in _MAJORS]
    for name in names:  # MLX for CUDA has loaded its version
        try:
            return ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            continue
    in_wheels = [str(path) for name in names for root in _wheels() for path in sorted(root.glob(f"*/lib/{name}"))]
    for name in [*in_wheels, *names]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CompilerError("libnvrtc does not load; pip install nvidia-cuda-nvrtc")


def _include_folders() -> Iterator[Path]:
    """Yield folders that may hold CUDA's headers, in MLX's order."""
    for root in _wheels():
        yield from sorted(root.glob("*/include"))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield Path(home, "include")
    yield Path("/usr/local/cuda/include")


def _wheels() -> list[Path]:
    found = find_spec("nvidia")
    return [] if found is None else [Path(location) for location in found.submodule_search_locations or ()]
