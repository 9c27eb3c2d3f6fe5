"""Compile kernels for CUDA without a GPU, by the wheel of NVIDIA's run-time compiler."""

import struct
from collections.abc import Mapping, Sequence

import mlx.core as mx

from flashmoe_mlx.custom_kernels.kernel import Kernel
from flashmoe_mlx.custom_kernels.nvrtc import compiler


def compile_for_cuda(
    kernel: Kernel,
    inputs: Sequence[mx.Dtype],
    outputs: Sequence[mx.Dtype],
    template: Mapping[str, int | mx.Dtype],
    architecture: str = "sm_90a",
) -> bytes:
    """Return the machine code of the text that runs on GPUs; raise CompilerError with the compiler's messages."""
    text = kernel.cuda_text(inputs, outputs, tuple(template.items()))
    return compiler().compile(text, kernel.name, architecture)


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
