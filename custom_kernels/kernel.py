"""One body of source that runs as a Metal and as a CUDA kernel.

A body uses only words that Metal and CUDA share or that ``dialects/`` defines for both. The rules:

- cast every load to float;
- declare arrays in threadgroup memory ``SHARED``, and pointer parameters to them ``threadgroup``;
- pass indices to helper functions as arguments, because Metal gives them to the body alone;
- use no lambdas;
- read a size of an input as ``<input>_shape[2]``, with a literal axis;
- start whole threadgroups, because CUDA rounds a grid up and Metal does not.

Pass scalars as template arguments (a float by ``bits_of``) or as shapes of inputs, never as arrays: on CUDA MLX keeps
arrays of up to 8 bytes in memory shared with the host, and every simdgroup that reads one may have to cross the bus.
A number that changes with every call is an array of at least 16 bytes that an operation computed.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Literal, cast

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import precompiled
from flashmoe_mlx.custom_kernels.cuda_text import cuda_text, shape_reads

__all__ = ["Arguments", "Kernel", "Outputs", "after", "bits_of", "dialect", "dialect_text"]

Arguments = Mapping[str, int | mx.Dtype]
"""The values of a kernel's template parameters, by name."""
Outputs = Sequence[tuple[tuple[int, ...], mx.Dtype]]
"""The shape and the type of each output."""


def dialect() -> Literal["metal", "cuda"] | None:
    """Return the language of kernels for the default device: "metal" or "cuda"; None on a CPU."""
    if mx.default_device() != mx.gpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


class Kernel:
    """The kernel in ``<body>.h`` beside the module that makes it.

    Its source consists of the dialect's definitions, ``headers``, and the body.

    Args:
        package: the ``__package__`` of that module.
        body: name of the file with the body, without its suffix.
        inputs: names of the inputs.
        outputs: names of the outputs.
        headers: names of files in ``dialects/``.
        switches: names that are defined as 0 or 1 for the preprocessor, for bodies with an optional input.
        in_place: names of the inputs that the kernel writes to. Nothing else may be reading these arrays, and later
            operations that read them must use an output of the kernel: see ``after``.
        shared_memory: size in bytes of the memory that a body for CUDA declares as ``extern __shared__``.
    """

    def __init__(
        self,
        package: str | None,
        body: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        headers: Sequence[str] = (),
        switches: Mapping[str, bool] | None = None,
        in_place: Sequence[str] = (),
        shared_memory: int = 0,
    ) -> None:
        assert package is not None
        folder = package.rpartition(".")[2]
        self.name: str = "_".join([folder, body, *(name.lower() for name, on in (switches or {}).items() if on)])
        self.inputs: list[str] = list(inputs)
        self.outputs: list[str] = list(outputs)
        self.in_place: list[str] = list(in_place)
        self.shared_memory = shared_memory
        self._body = (package, f"{body}.h")
        self._headers = headers
        self._switches = switches or {}

    def source(self, dialect: str) -> tuple[str, str]:
        """Return the header and the body."""
        switches = "".join(f"#define {name} {int(value)}\n" for name, value in self._switches.items())
        headers = [dialect_text(name) for name in (dialect, *self._headers)]
        return "\n".join([switches, *headers]), _text(*self._body)

    def cuda_text(
        self, inputs: Sequence[mx.Dtype], outputs: Sequence[mx.Dtype], template: Sequence[tuple[str, int | mx.Dtype]]
    ) -> str:
        """Return the complete text for CUDA; see ``cuda_text.cuda_text``.

        Args:
            inputs: types of the inputs.
            outputs: types of the outputs.
            template: values of the template arguments.
        """
        header, body = self.source("cuda")
        typed_inputs, typed_outputs = zip(self.inputs, inputs, strict=True), zip(self.outputs, outputs, strict=True)
        return cuda_text(self.name, list(typed_inputs), list(typed_outputs), header, body, template)

    def __call__(
        self,
        inputs: Sequence[mx.array],
        outputs: Outputs,
        threadgroups: tuple[int, int, int],
        threads: int,
        template: Arguments,
    ) -> list[mx.array]:
        """Run the kernel.

        Args:
            inputs: arrays, in the order of the kernel's inputs.
            outputs: shape and type of each output.
            threadgroups: number of threadgroups in each dimension.
            threads: number of threads in a threadgroup.
            template: values of the template arguments.
        """
        x, y, z = threadgroups
        shapes, types = [shape for shape, _ in outputs], [dtype for _, dtype in outputs]
        grid, threadgroup = (x * threads, y, z), (threads, 1, 1)
        language = dialect()
        if language == "cuda" and precompiled.refusal() is None:
            code = _machine_code(self, tuple(array.dtype for array in inputs), tuple(types), tuple(template.items()))
            if precompiled.planned(code):
                return [mx.zeros(shape, dtype) for shape, dtype in outputs]
            made = code.get()
            if isinstance(made, bytes):
                return mx.fast.precompiled_cuda_kernel(
                    name=self.name,
                    compiled_source=made,
                    inputs=list(inputs),
                    output_shapes=shapes,
                    output_dtypes=types,
                    scalars=[inputs[position].shape[axis] for position, axis in _shape_reads(self)],
                    grid=grid,
                    threadgroup=threadgroup,
                    shared_memory=self.shared_memory,
                    ensure_row_contiguous=True,
                )
        return compiled(language, self)(
            inputs=list(inputs),
            output_shapes=shapes,
            output_dtypes=types,
            grid=grid,
            threadgroup=threadgroup,
            template=list(template.items()),
        )


@cache
def _machine_code(
    kernel: Kernel,
    inputs: tuple[mx.Dtype, ...],
    outputs: tuple[mx.Dtype, ...],
    template: tuple[tuple[str, int | mx.Dtype], ...],
) -> precompiled.MachineCode:
    """Return the machine code of ``kernel`` for CUDA, perhaps not compiled yet."""
    return precompiled.MachineCode(kernel.name, kernel.cuda_text(inputs, outputs, template))


@cache
def _shape_reads(kernel: Kernel) -> tuple[tuple[int, int], ...]:
    return shape_reads(kernel.source("cuda")[1], tuple(kernel.inputs))


@cache
def compiled(dialect: str | None, kernel: Kernel) -> Callable[..., list[mx.array]]:
    """Return MLX's function that runs ``kernel``; MLX compiles it at the first call."""
    assert dialect is not None, "custom kernels need a GPU"
    name, inputs, outputs, (header, body) = kernel.name, kernel.inputs, kernel.outputs, kernel.source(dialect)
    if dialect == "metal":
        made: object = mx.fast.metal_kernel(name, inputs, outputs, body, header)
    else:
        made = mx.fast.cuda_kernel(name, inputs, outputs, body, header, shared_memory=kernel.shared_memory)
    return cast(Callable[..., list[mx.array]], made)


def dialect_text(name: str) -> str:
    """Return the text of ``dialects/<name>.h``."""
    return _text("flashmoe_mlx.custom_kernels", "dialects", f"{name}.h")


@cache
def _text(package: str, *path: str) -> str:
    return files(package).joinpath(*path).read_text()


def after(output: mx.array, array: mx.array) -> mx.array:
    """Return a copy of ``array``, made after the kernel that returned ``output`` wrote to ``array`` in place.

    On CUDA MLX orders operations by the memory that they read and write, as far as it knows, so ``mx.depends`` is not
    enough.
    """
    nothing = mx.isnan(output.reshape(-1)[:1]) & False
    return array + nothing.astype(array.dtype)


def bits_of(value: float) -> int:
    """Return the bits of ``value`` in f32 as an int32, for a body that reads it by ``as_type<float>``."""
    return int(np.float32(value).view(np.int32))
