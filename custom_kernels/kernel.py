"""One body of source, run as a Metal or a CUDA kernel.

A body is written in the words that Metal and CUDA share, or that ``dialects/`` give them. The rules: every load is cast
to float; arrays in threadgroup memory are declared
``SHARED``, parameters that point to one ``threadgroup``; helpers get indices as arguments, because Metal hands them to
the body alone; no lambdas; grids in whole threadgroups, because CUDA would start more threads and Metal would not.

Scalars come as template arguments (``bits_of`` a float) or as shapes of inputs, never as arrays: on CUDA MLX keeps
arrays of up to 8 bytes in memory that the host shares, and every simdgroup that reads one may have to cross the bus.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from importlib.resources import files
from typing import cast

import mlx.core as mx
import numpy as np

Arguments = Mapping[str, int | mx.Dtype]
Outputs = Sequence[tuple[tuple[int, ...], mx.Dtype]]


def dialect() -> str | None:
    """What custom kernels of the default device are written in: "metal", "cuda" or, on a CPU, None."""
    if mx.default_device() != mx.gpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


class Kernel:
    """The kernel ``<folder>/<body>.h`` with ``inputs`` and ``outputs``, after the dialect's words and ``headers``.

    ``switches`` become 0 or 1 for the preprocessor: bodies with and without an input need them. Inputs ``in_place`` are
    written to; nothing may be reading them, and what is to see the writing must use an output of the kernel.
    ``shared_memory`` is what a body for CUDA alone declares as ``extern __shared__``, in bytes.
    """

    def __init__(
        self,
        folder: str,
        body: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        headers: Sequence[str] = (),
        switches: Mapping[str, bool] | None = None,
        in_place: Sequence[str] = (),
        shared_memory: int = 0,
    ) -> None:
        self.name = "_".join([folder, body, *(name.lower() for name, on in (switches or {}).items() if on)])
        self.inputs, self.outputs, self.in_place = list(inputs), list(outputs), list(in_place)
        self.shared_memory = shared_memory
        self._body = (folder, f"{body}.h")
        self._headers = headers
        self._switches = switches or {}

    def source(self, dialect: str) -> tuple[str, str]:
        """Header and body."""
        switches = "".join(f"#define {name} {int(value)}\n" for name, value in self._switches.items())
        headers = [_text("dialects", f"{name}.h") for name in (dialect, *self._headers)]
        return "\n".join([switches, *headers]), _text(*self._body)

    def __call__(
        self,
        inputs: Sequence[mx.array],
        outputs: Outputs,
        threadgroups: tuple[int, int, int],
        threads: int,
        template: Arguments,
    ) -> list[mx.array]:
        """Run ``threadgroups`` groups of ``threads`` threads; ``outputs`` are shapes and types."""
        x, y, z = threadgroups
        kernel = compiled(dialect(), self)
        return kernel(
            inputs=list(inputs),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            grid=(x * threads, y, z),
            threadgroup=(threads, 1, 1),
            template=list(template.items()),
        )


@cache
def compiled(dialect: str | None, kernel: Kernel) -> Callable[..., list[mx.array]]:
    assert dialect is not None, "custom kernels need a GPU"
    name, inputs, outputs, (header, body) = kernel.name, kernel.inputs, kernel.outputs, kernel.source(dialect)
    if dialect == "metal":
        made: object = mx.fast.metal_kernel(name, inputs, outputs, body, header)
    else:
        made = mx.fast.cuda_kernel(name, inputs, outputs, body, header, shared_memory=kernel.shared_memory)
    return cast(Callable[..., list[mx.array]], made)


@cache
def _text(*path: str) -> str:
    return files("flashmoe_mlx.custom_kernels").joinpath(*path).read_text()


def bits_of(value: float) -> int:
    """``value`` in f32 as an int32, for a template argument that a body reads with ``as_type<float>``."""
    return int(np.float32(value).view(np.int32))


@lru_cache(maxsize=16)
def length_as_shape(length: int) -> mx.array:
    """[length] bytes without a meaning, for kernels that ask for the shape alone: it comes along with the launch."""
    array = _ruler(1 << (length - 1).bit_length())[:length]
    mx.eval(array)
    return array


@cache
def _ruler(room: int) -> mx.array:
    array = mx.zeros((room,), mx.uint8)
    mx.eval(array)
    return array
