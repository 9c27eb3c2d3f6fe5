"""Compile kernels for CUDA without a GPU, by the wheel of NVIDIA's run-time compiler.

The text around a body is the same as MLX's (``mlx/backend/cuda/custom_kernel.cpp``): arguments in the order of inputs
and outputs, template arguments as constants inside the function.
"""

import ctypes
import struct
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx

from flashmoe_mlx.custom_kernels.kernel import Kernel

C_TYPES = {
    mx.float32: "float",
    mx.bfloat16: "__nv_bfloat16",
    mx.float16: "__half",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
}
_PROLOGUE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef signed int int32_t;
typedef unsigned int uint32_t;
typedef signed long long int64_t;
typedef unsigned char uint8_t;
struct Shape { int32_t sizes[10]; int32_t operator[](int i) const { return sizes[i]; } };
"""


def compile_for_cuda(
    kernel: Kernel,
    inputs: Sequence[mx.Dtype],
    outputs: Sequence[mx.Dtype],
    template: Mapping[str, int | mx.Dtype],
    architecture: str = "sm_90a",
) -> bytes:
    """Return the machine code; raise AssertionError with the compiler's messages on failure."""
    header, body = kernel.source("cuda")
    pairs = []
    for name, dtype in zip(kernel.inputs, inputs, strict=True):
        pairs.append(f"const {C_TYPES[dtype]}* {name}")
        if f"{name}_shape" in body:
            pairs.append(f"const __grid_constant__ Shape {name}_shape")
    pairs += [f"{C_TYPES[dtype]}* {name}" for name, dtype in zip(kernel.outputs, outputs, strict=True)]
    constants = [
        f"constexpr int {name} = {value};" if isinstance(value, int) else f"using {name} = {C_TYPES[value]};"
        for name, value in template.items()
    ]
    text = "\n".join(
        [
            _PROLOGUE,
            header,
            "namespace mlx::core::cu {",
            f'extern "C" __global__ void {kernel.name}({", ".join(pairs)}) {{',
            *constants,
            body,
            "}}",
        ]
    )
    return _compile(text, kernel.name, architecture)


def registers(cubin: bytes) -> int:
    """Return the registers per thread of the kernel in ``cubin``: EIATTR_REGCOUNT in the section ``.nv.info``."""
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names = struct.unpack_from("<HH", cubin, 0x3C)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + 64 * i) for i in range(count)]
    for name, _, _, _, start, size in headers:
        if not cubin.startswith(b".nv.info\0", headers[names][4] + name):
            continue
        at = start
        while at < start + size:
            form, attribute, length = struct.unpack_from("<BBH", cubin, at)
            if (form, attribute) == (4, 0x2F):
                return int(struct.unpack_from("<II", cubin, at + 4)[1])
            at += 4 + length * (form == 4)
    raise AssertionError("no number of registers in this machine code")


def _compile(text: str, name: str, architecture: str) -> bytes:
    library, include = _found()
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None))
    options = [
        b"--device-as-default-execution-space",
        f"--gpu-architecture={architecture}".encode(),
        f"--include-path={include}".encode(),
        b"--std=c++17",
    ]
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    _check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    log = ctypes.create_string_buffer(size.value)
    _check(library.nvrtcGetProgramLog(program, log))
    assert status == 0, log.value.decode()
    _check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
    code = ctypes.create_string_buffer(size.value)
    _check(library.nvrtcGetCUBIN(program, code))
    _check(library.nvrtcDestroyProgram(ctypes.byref(program)))
    return code.raw


def _found() -> tuple[ctypes.CDLL, Path]:
    package = find_spec("nvidia")
    assert package is not None, "pip install nvidia-cuda-nvrtc nvidia-cuda-runtime"
    roots = [Path(location) for location in package.submodule_search_locations or ()]
    libraries = [path for root in roots for path in root.glob("*/lib/libnvrtc.so.*")]
    headers = [path.parent for root in roots for path in root.glob("*/include/cuda_bf16.h")]
    assert libraries, "pip install nvidia-cuda-nvrtc"
    assert headers, "pip install nvidia-cuda-runtime"
    return ctypes.CDLL(str(libraries[0])), headers[0]


def _check(status: int) -> None:
    assert status == 0, f"NVRTC error {status}"
