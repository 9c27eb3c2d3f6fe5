"""Kernels for CPUs, in a C++ extension; see ``operators.hpp`` for what each computes.

Buffers go in and out: an ``mx.array`` is one, and is evaluated when it is looked into. What is returned is evaluated.
Two environment variables are read once, at the first use; empty ones count as unset: ``FLASHMOE_THREADS`` (1 to 256;
default: the cores that this process may use) and ``FLASHMOE_INSTRUCTIONS`` (``avx512_vnni``, ``avx512``, ``avx2``,
``neon`` or ``portable``; default: the best of this machine).
"""

import math
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels.attention.reference import AttentionWeights
from flashmoe_mlx.custom_kernels.expert_mlp.reference import ExpertWeights, Weight
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import DeltaWeights
from flashmoe_mlx.custom_kernels.routed_experts.format import PROJECTIONS, ExpertFormat
from flashmoe_mlx.errors import InputError

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
LANES = 16
"""Head sizes must be a multiple of this."""
MISSING = (
    "the extension for CPUs is not installed, so this run uses MLX's CPU operations, which are many times slower; "
    "install a C++ compiler (Debian: apt install g++; macOS: xcode-select --install) and run pip install again"
)

# `python -m flashmoe_mlx` in a checkout runs the checkout's Python, while the compiled part lies where pip put it.
__path__.extend(str(folder) for folder in (Path(entry, *__name__.split(".")) for entry in sys.path) if folder.is_dir())

_INTERFACE = 4
"""Counts changes of what the compiled part takes, so that one of another version is not called."""
_SCALES = {mx.float32: 0, mx.bfloat16: 1, mx.float16: 2}
_SHOWN = 40
"""Characters of a wrong variable that an error repeats."""
_COPIED = 2**18
"""Elements up to which an array is made by copying; larger ones are allocated by MLX and written in place."""


@cache
def extension() -> ModuleType | None:
    """Load the compiled part; None where it was not built, or was built for another version of this package.

    Raises:
        InputError: an environment variable asks for what is not there.
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
    """Cores that this process may use: its affinity, and on Linux the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return cores if quota is None else max(1, min(cores, quota))


def _quota(membership: Path, root: Path) -> int | None:
    """Whole cores that control groups (version 2, else 1) allow this process and all groups above it."""
    try:
        groups = dict(line.split(":", 2)[1:] for line in membership.read_text().splitlines())
    except (OSError, ValueError):
        return None
    limits = []
    own = Path(groups.get("", "/").lstrip("/"))
    for folder in (own, *own.parents):
        with_quota = _numbers(root / folder / "cpu.max")
        if len(with_quota) == 2:
            limits.append(with_quota[0] / with_quota[1])
    for name, path in groups.items():
        if "cpu" in name.split(","):
            own = root / name / path.lstrip("/")
            quota, period = (_numbers(own / f"cpu.cfs_{what}_us") for what in ("quota", "period"))
            if quota and period and quota[0] > 0:
                limits.append(quota[0] / period[0])
    return round(min(limits) + 0.49) if limits else None


def _numbers(path: Path) -> list[int]:
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):  # no such file, or "max"
        return []


def description() -> str:
    """What runs, for the record of a run."""
    native = _loaded()
    return f"{native.instruction_set()}, {native.threads()} threads"


def few_tokens() -> int:
    """Return up to how many vectors products pass over the codes; for more, blocks are dequantised."""
    few: int = _loaded().FEW_TOKENS
    return few


def takes_matrix(bits: int | None, group_size: int | None, scales: mx.Dtype | None) -> bool:
    """Whether there are kernels for matrices of this form."""
    return bits in BITS and group_size in GROUP_SIZES and scales in _SCALES


def takes_weight(weight: Weight) -> bool:
    """Whether there are kernels for this matrix."""
    return takes_matrix(weight.bits, weight.group_size, None if weight.scales is None else weight.scales.dtype)


def quantised_product(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> mx.array:
    """As ``quantised_matvec.reference.quantised_matvec`` for ``x`` in f32, any number of vectors."""
    return quantised_products(x, [Weight(weight, scales, biases, bits, group_size)])[0]


def quantised_products(x: mx.array, weights: Sequence[Weight], before: mx.array | None = None) -> tuple[mx.array, ...]:
    """As ``quantised_matvec.Products`` for ``x`` in f32, any number of vectors."""
    tokens = len(x)
    matrices = tuple(_matrix(one) for one in weights)
    results = [_Output((tokens, matrix[3]), before) for matrix in matrices]
    _loaded().products(x, tokens, matrices, tuple(y.buffer for y in results), before is not None)
    return tuple(y.array() for y in results)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """X / rms(x) * weight for ``x`` [T, width] in f32."""
    y = _Output(x.shape)
    _loaded().rms_norm(x, *x.shape, weight, eps, y.buffer)
    return y.array()


def routed_experts(
    x: mx.array,
    records: Sequence[memoryview],
    rows: mx.array,
    shares: mx.array,
    form: ExpertFormat,
    shared: ExpertWeights | None = None,
    before: mx.array | None = None,
) -> mx.array:
    """As ``routed_experts.reference.routed_experts`` in f32, for any number of tokens.

    ``rows`` names elements of ``records``, each in place. ``before`` [T, hidden] is added; it is what other experts
    said of the same tokens.
    """
    y = _Output(x.shape, before)
    offsets = tuple(form.offsets[f"{p}.{part}"] for p in PROJECTIONS for part in ("weight", "scales", "biases"))
    layout = (form.hidden_size, form.intermediate_size, form.bits, form.group_size, _SCALES[form.dtype], offsets)
    matrices = None if shared is None else tuple(_matrix(one) for one in (shared.gate, shared.up, shared.down))
    _loaded().experts(x, len(x), list(records), layout, rows, shares, rows.shape[1], matrices, y.buffer)
    return y.array()


def joins(shared: ExpertWeights) -> bool:
    """Whether ``routed_experts`` can take this shared expert along."""
    return all(takes_weight(one) for one in (shared.gate, shared.up, shared.down)) and (
        shared.gate.bits,
        shared.gate.group_size,
    ) == (shared.up.bits, shared.up.group_size)


def _matrix(weight: Weight) -> tuple[mx.array, mx.array, mx.array, int, int, int, int, int]:
    assert weight.scales is not None
    assert weight.biases is not None
    assert weight.bits is not None
    assert weight.group_size is not None
    rows, groups = weight.scales.shape
    form = (rows, groups * weight.group_size, weight.bits, weight.group_size, _SCALES[weight.scales.dtype])
    return (weight.weight, weight.scales, weight.biases, *form)


def gated_delta_net(
    qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, weights: DeltaWeights, past: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """As ``gated_delta_net.reference.gated_delta_net`` in f32, with ``past`` and ``state`` overwritten."""
    shape = (weights.key_heads, weights.value_heads, weights.key_dim, weights.value_dim, weights.taps)
    y = _Output(z.shape)
    own = (weights.convolution, weights.a_log, weights.dt_bias, weights.norm)
    _loaded().delta_net(qkv, z, b, a, len(qkv), *own, shape, weights.eps, past, state, y.buffer)
    return y.array(), past, state


def gated_attention(
    q_and_gate: mx.array,
    k: mx.array,
    v: mx.array,
    weights: AttentionWeights,
    keys: mx.array,
    values: mx.array,
    start: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """As ``attention.reference.gated_attention`` in f32, with the cache written in place."""
    heads, dim = weights.heads, weights.head_dim
    y = _Output((len(k), heads * dim))
    shape = (heads, weights.kv_heads, dim, weights.rotary_dim, keys.shape[2], start)
    norms = (weights.q_norm, weights.k_norm)
    own = (shape, weights.turns(), weights.eps)
    _loaded().attention(q_and_gate, k, v, len(k), *norms, *own, keys, values, y.buffer)
    return y.array(), keys, values


def _loaded() -> ModuleType:
    native = extension()
    assert native is not None, "the extension was not built"
    return native


class _Output:
    """Room for a result in f32; MLX cannot take over memory of others on a CPU, so a small one is copied."""

    def __init__(self, shape: tuple[int, ...], before: mx.array | None = None) -> None:
        self._array: mx.array | None = None
        if math.prod(shape) > _COPIED:
            self._array = mx.zeros(shape) if before is None else mx.array(np.asarray(before))
            mx.eval(self._array)
            self.buffer: mx.array | npt.NDArray[np.float32] = self._array
        else:
            self.buffer = np.zeros(shape, np.float32) if before is None else np.array(before)

    def array(self) -> mx.array:
        """The result."""
        return mx.array(self.buffer) if self._array is None else self._array
