"""The complete CUDA text of a kernel: its definitions and its body inside a function.

The function takes the inputs, the outputs, and then the sizes of inputs that the body reads as ``<input>_shape[i]``.
"""

import re
from collections.abc import Sequence
from functools import cache

import mlx.core as mx

_INCLUDES = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef signed int int32_t;
typedef unsigned int uint32_t;
typedef signed long int64_t;
typedef unsigned long uint64_t;
typedef unsigned char uint8_t;
"""
_C_TYPES = {
    mx.float32: "float",
    mx.bfloat16: "__nv_bfloat16",
    mx.float16: "__half",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
    mx.int64: "int64_t",
    mx.uint64: "uint64_t",
    mx.uint8: "uint8_t",
}
Argument = tuple[str, mx.Dtype]


def cuda_text(
    name: str,
    inputs: Sequence[Argument],
    outputs: Sequence[Argument],
    header: str,
    body: str,
    template: Sequence[tuple[str, int | mx.Dtype]],
) -> str:
    """Return the text of a kernel.

    Args:
        name: name of the function.
        inputs: name and type of each input.
        outputs: name and type of each output.
        header: definitions before the function.
        body: statements of the function.
        template: values of the template arguments, which become constants of the function.
    """
    reads = shape_reads(body, tuple(name for name, _ in inputs))
    parameters = [
        *(f"const {_C_TYPES[dtype]}* {name}" for name, dtype in inputs),
        *(f"{_C_TYPES[dtype]}* {name}" for name, dtype in outputs),
        *(f"const int {inputs[position][0]}_shape_{axis}" for position, axis in reads),
    ]
    constants = [
        f"using {name} = {_C_TYPES[value]};" if isinstance(value, mx.Dtype) else f"constexpr int {name} = {value};"
        for name, value in template
    ]
    shapes = []
    for position in sorted({position for position, _ in reads}):
        own = {axis for at, axis in reads if at == position}
        name_of = inputs[position][0]
        sizes = [f"{name_of}_shape_{axis}" if axis in own else "0" for axis in range(max(own) + 1)]
        shapes.append(f"const int {name_of}_shape[] = {{{', '.join(sizes)}}};")
    function = f'extern "C" __global__ void {name}({", ".join(parameters)}) {{'
    return "\n".join([_INCLUDES, header, function, *constants, *shapes, body, "}", ""])


@cache
def shape_reads(body: str, inputs: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Return the sizes that ``body`` reads, in the order of the function's arguments: (position of input, axis)."""
    found = {(name, int(axis)) for name, axis in re.findall(r"\b(\w+)_shape\[(\d+)\]", body)}
    return tuple(sorted((inputs.index(name), axis) for name, axis in found if name in inputs))
