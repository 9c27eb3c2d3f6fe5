"""The C++ extension with kernels for CPUs, and the code that the ``cpu.py`` of all operations share.

``operators.hpp`` describes the kernels. They read and write Python buffers; an ``mx.array`` is a buffer, and is
evaluated when it is accessed. Results are evaluated.

Two environment variables are read at the first use; an empty variable counts as unset: ``FLASHMOE_THREADS`` (1 to 256;
default: the cores that this process may use) and ``FLASHMOE_INSTRUCTIONS`` (``avx512_vnni``, ``avx512``, ``avx2``,
``neon`` or ``portable``; ``auto`` for the first of these that this machine has; default: measured at load where the
instruction set matters most, see ``fastest.py``, else ``auto``).
"""

import math
import os
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx import cgroups
from flashmoe_mlx.custom_kernels.native.untouched import untouched
from flashmoe_mlx.custom_kernels.weights import QuantizedWeight
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.record import AFFINE, FLOAT_MODES

BITS = (2, 3, 4, 8)
ACTIVATIONS = ("f32", "bf16", "int8")
"""Types of vectors in products of many vectors: exact, or rounded to 8 bits of precision, bf16 with an exponent for
each value and int8 with a scale for each group."""
GROUP_SIZES = (32, 64, 128)
LANES = 16
"""Head sizes must be a multiple of this."""
MISSING = (
    "the extension for CPUs is not installed, so this run uses MLX's CPU operations, which are many times slower; "
    "install a C++ compiler (Debian: apt install g++; macOS: xcode-select --install) and run pip install again"
)

# `python -m flashmoe_mlx` in a checkout runs the checkout's Python files; the compiled part is where pip installed it.
__path__.extend(str(folder) for folder in (Path(entry, *__name__.split(".")) for entry in sys.path) if folder.is_dir())

_INTERFACE = 14
"""Version of the compiled part's interface; another version is not called."""
SCALES = {mx.float32: 0, mx.bfloat16: 1, mx.float16: 2, mx.uint8: 3}
"""Numbers of the types of scales in the compiled part; bytes are the exponents of mxfp4."""
_SHOWN = 40
"""Maximum number of characters of an invalid variable in an error."""
_COPIED = 2**18
"""Maximum number of elements of a copied result; a larger result is written in place to memory of MLX."""


@cache
def extension() -> ModuleType | None:
    """Load the compiled part; return None if it was not built, or was built for another version of this package.

    Raises:
        InputError: an environment variable is invalid, or names instructions that this machine does not have.
    """
    try:
        native = import_module(f"{__name__}._native")
    except ImportError:
        return None
    if native.INTERFACE != _INTERFACE:
        return None
    native.use_threads(_threads(os.environ.get("FLASHMOE_THREADS"), native.MOST_THREADS))
    wanted = os.environ.get("FLASHMOE_INSTRUCTIONS") or "auto"
    if wanted not in ("auto", *native.instruction_sets()):
        raise InputError(
            f"FLASHMOE_INSTRUCTIONS={wanted[:_SHOWN]}: this machine has {', '.join(native.instruction_sets())}; choose "
            "one of these or unset the variable",
            code="unknown_instructions",
        )
    native.use_instruction_set(wanted)
    return native


def _threads(wanted: str | None, most: int) -> int:
    if not wanted:
        return min(usable_cores(), most)
    if not re.fullmatch("[0-9]{1,9}", wanted) or not 1 <= int(wanted) <= most:
        raise InputError(
            f"FLASHMOE_THREADS={wanted[:_SHOWN]}: must be a whole number from 1 to {most}", code="invalid_threads"
        )
    return int(wanted)


def usable_cores() -> int:
    """Return the cores that this process may use: its affinity, and on Linux the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroups.cpu_quota()
    return cores if quota is None else max(1, min(cores, quota))


def description() -> str:
    """Return the instruction set and the number of threads, for the records of runs."""
    native = loaded()
    return f"{native.instruction_set()}, {native.threads()} threads"


def in_use() -> str:
    """Return the instruction sets that the extension uses and the number of threads, for the records of runs."""
    native = loaded()
    return f"{' and '.join(native.instruction_sets_in_use())}, {native.threads()} threads"


def few_tokens() -> int:
    """Return the most vectors for which products read codes directly; with more, they dequantize blocks first."""
    few: int = loaded().FEW_TOKENS
    return few


def has_activations(activations: str) -> bool:
    """Return whether this machine has products with vectors of this type, a member of ``ACTIVATIONS``."""
    native = extension()
    return native is not None and bool(native.has_activations(ACTIVATIONS.index(activations)))


def rounded_phrase(activations: str) -> str:
    """Return the phrase for rounded vectors in the names of code paths; empty for exact vectors."""
    return "" if activations == "f32" else f"vectors in {activations}"


def tokens_phrases(tokens: int, activations: str) -> tuple[str, ...]:
    """Return the phrases for the number of tokens, and for rounded vectors, in the names of code paths of products."""
    few = few_tokens()
    if tokens <= few:
        return ("one token" if tokens == 1 else f"2 to {few} tokens", "")
    return f"more than {few} tokens", rounded_phrase(activations)


def modes() -> tuple[str, ...]:
    """Return MLX's modes of quantization that kernels read.

    Portable instructions have no lookup of bytes; with them, MLX's operations compute mxfp4 in less time.
    """
    return (AFFINE,) if loaded().instruction_set() == "portable" else (AFFINE, "mxfp4")


def supports_matrix(bits: int | None, group_size: int | None, scales: mx.Dtype | None) -> bool:
    """Return whether there are kernels for matrices of this format; ``scales`` is None for a matrix of floats."""
    if scales is None:
        return False
    if scales == mx.uint8:
        return (bits, group_size) == FLOAT_MODES["mxfp4"]
    return bits in BITS and group_size in GROUP_SIZES and scales in SCALES


def supports_weight(weight: QuantizedWeight) -> bool:
    """Return whether there are kernels for this matrix."""
    return supports_matrix(weight.bits, weight.group_size, None if weight.scales is None else weight.scales.dtype)


def matrix(weight: QuantizedWeight) -> tuple[mx.array, mx.array, mx.array, int, int, int, int, int]:
    """Return a matrix for the compiled part: three arrays, rows, columns, bits, group size, type of scales.

    In mxfp4, biases follow from the scales, which stand in their place.
    """
    assert weight.scales is not None
    assert weight.bits is not None
    assert weight.group_size is not None
    rows, groups = weight.scales.shape
    form = (rows, groups * weight.group_size, weight.bits, weight.group_size, SCALES[weight.scales.dtype])
    return (weight.weight, weight.scales, weight.scales if weight.biases is None else weight.biases, *form)


def largest(values: npt.NDArray[np.float32], lengths: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.int32]:
    """Return the indices [rows, count] of the largest values of each row, in any order.

    Equal values are chosen as by torch's ``topk`` on a CPU.

    Args:
        values: [rows, columns]; NaN counts as the largest value.
        lengths: the number of values of each row that may be chosen, at least ``count``.
        count: the number of values to choose.
    """
    indices = np.empty((len(values), count), np.int32)
    loaded().largest(values, lengths, *values.shape, count, indices)
    return indices


def loaded() -> ModuleType:
    """Return the compiled part; the caller knows that it exists."""
    native = extension()
    assert native is not None, "the extension was not built"
    return native


class Output:
    """Memory for a result in f32.

    On a CPU MLX cannot take over a buffer, so a small result is copied, and a large one is allocated by MLX.

    Args:
        shape: shape of the result.
        residual: initial values, to which the kernel adds.
        in_place: whether the result may take the memory of ``residual``, which then has other values.
        zeros: without ``residual``, whether initial values are zeros rather than arbitrary.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        residual: mx.array | None = None,
        in_place: bool = False,
        zeros: bool = False,
    ) -> None:
        self._array: mx.array | None = None
        self.buffer: mx.array | npt.NDArray[np.float32]
        if math.prod(shape) > _COPIED:
            if in_place and residual is not None:
                self.buffer = self._array = residual
                return
            self.buffer = self._array = untouched(shape)
            loaded().large_pages(self._array, self._array.size)
            if residual is not None or zeros:
                loaded().fill(self._array, residual, self._array.size)
        else:
            self.buffer = np.zeros(shape, np.float32) if residual is None else np.array(residual)

    def array(self) -> mx.array:
        """Return the result."""
        return mx.array(self.buffer) if self._array is None else self._array
